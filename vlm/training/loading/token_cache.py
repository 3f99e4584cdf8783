"""Image tokens of a frozen image tokenizer, kept on disk for the epochs after the first.

An entry is named by what decides it: the tokenizer's weights, what it is made of, the precision
that it computes in, and the pixels themselves, as preprocessing made them from an image. So an
entry can never be stale: another image, another crop, other weights have another name. Images
that are changed at random have new pixels each time, and gain nothing.

Shapes: V view, L image tokens of a view, D width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlm.image_tokens import ImageTokenizer, ImageTokens, Pixels, map_pixels


@dataclass
class Uses:
    """Views whose tokens were read from the cache, and those that were computed and kept."""

    read: int = 0
    kept: int = 0


@contextmanager
def cached_tokens(tokenizer: ImageTokenizer, folder: Path) -> Iterator[Uses]:
    """Within, a frozen image tokenizer reads the tokens of views that it has seen from `folder`,
    and writes those of new ones there. Processes may share the folder.

    Raises ValueError where the tokenizer learns, or gives random tokens: they would be old ones;
    and where no configuration names its parts.
    """
    learning = [name for name, p in tokenizer.named_parameters() if p.requires_grad]
    if learning or tokenizer.training:
        raise ValueError(
            f"{folder}: tokens of a frozen image tokenizer in evaluation mode can be kept, found "
            f"{len(learning)} of its weights learning, such as {learning[:3]}"
            if learning
            else f"{folder}: expected the image tokenizer in evaluation mode, found training mode"
        )
    try:
        weights = fingerprint(tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{folder}: tokens of {type(tokenizer).__name__} cannot be kept: {error}"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    compute, uses = tokenizer.forward, Uses()
    before = vars(tokenizer).get("forward")  # where it has one of its own beside its class's

    def forward(pixels: Pixels) -> ImageTokens:
        if pixels_of(pixels)[0].is_meta:
            return compute(pixels)
        return _through(folder, weights, compute, pixels, uses)

    tokenizer.forward = forward
    try:
        yield uses
    finally:
        if before is None:
            del tokenizer.forward
        else:
            tokenizer.forward = before


def fingerprint(tokenizer: ImageTokenizer) -> str:
    """A hash of all weights and buffers of an image tokenizer, with names, dtypes and bits, and of
    its printed form, which holds the sizes and kinds of its layers.

    Raises ValueError where no configuration can name its parts."""
    digest = hashlib.sha256(f"{tokenizer!r} {getattr(tokenizer, 'config', None)}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def pixels_of(pixels: Pixels) -> list[Tensor]:
    """The tensors in `pixels`, in order."""
    found: list[Tensor] = []
    map_pixels(lambda tensor: found.append(tensor) or tensor, pixels)
    return found


def _through(folder: Path, weights: str, compute, pixels: Pixels, uses: Uses) -> ImageTokens:
    parts = pixels_of(pixels)
    V, device = len(parts[0]), parts[0].device
    how = f"{weights} {torch.is_autocast_enabled(device.type)} {[p.dtype for p in parts]}"
    paths = [_path(folder, how, [part[view] for part in parts]) for view in range(V)]
    entries = [_read(path) for path in paths]
    missing = [view for view, entry in enumerate(entries) if entry is None]
    if missing:
        found = compute(map_pixels(lambda tensor: tensor[missing], pixels))
        for number, view in enumerate(missing):
            entries[view] = _entry(found, number)
            _write(paths[view], entries[view])
    uses.kept += len(missing)
    uses.read += V - len(missing)
    grids = {tuple(entry["grid_hw"].tolist()) for entry in entries}
    (grid,) = grids
    valid = [entry["valid"] for entry in entries if "valid" in entry]
    return ImageTokens(
        tokens=torch.stack([entry["tokens"] for entry in entries]).to(device),
        grid_hw=grid or None,
        valid=torch.stack(valid).to(device) if valid else None,
    )


def _entry(found: ImageTokens, number: int) -> dict[str, Tensor]:
    """One view of computed tokens; without the pooled vector, which no adaptor takes."""
    entry = {
        "tokens": found.tokens[number].detach().cpu().contiguous(),
        "grid_hw": torch.tensor(found.grid_hw or (), dtype=torch.long),
    }
    if found.valid is not None:
        entry["valid"] = found.valid[number].cpu().contiguous()
    return entry


def _path(folder: Path, how: str, views: list[Tensor]) -> Path:
    digest = hashlib.sha256(how.encode())
    for view in views:
        digest.update(f"{tuple(view.shape)}".encode())
        digest.update(_bytes(view))
    name = digest.hexdigest()
    return folder / name[:2] / f"{name}.safetensors"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The entry in a file; None where there is none, or a broken one, which is written anew."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in ("tokens", "grid_hw", "valid")
                    if key in file.keys()}  # fmt: skip  # noqa: SIM118 - no mapping
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, entry: dict[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(entry, part)
    os.replace(part, path)
