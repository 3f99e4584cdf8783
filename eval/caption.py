"""Captions of held-out pictures: exact match, CIDEr-D and BLEU-4, beside the nearest neighbour's.

    python eval/caption.py --model runs/stage1
    python eval/caption.py --model runs/stage1 --baseline sample:train
    accelerate launch --multi_gpu --num_processes 2 eval/caption.py --model runs/stage1

Rows that ask the same of the same picture are one: their answers are its references. Captions are
greedy. Batches are dealt to processes in turn and all figures are computed over all captions, so
that any number of processes gives the same ones. What is kept in memory are texts alone.

--baseline SOURCE adds what needs no language model: the caption of that source's picture which is
nearest to each, by the cosine of a pretrained backbone's features, averaged over their grid. Its
backbone is --baseline-vision and never the model's own, which training may have changed.

In --out: result.json, captions.jsonl (every caption) and captions.png (some, with pictures).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import vlm
from vlm import assets
from vlm.commands.evaluation import require_writable
from vlm.commands.model import require_least
from vlm.config import to_dict
from vlm.data.check import check_start, say_on
from vlm.data.example import BadRow, Example, Skipped
from vlm.data.sources import open_source
from vlm.data.sources.base import Source
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import Row, collate
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.image_tokens import ImageTokenizer, group_views
from vlm.metrics.caption import Pair, caption_figures, cider_d, exact_matches
from vlm.pixels import BadImage, open_image
from vlm.precision import Precision, dtype_name
from vlm.systems.pretrained import load_vision
from vlm.training.run_folder import draw_captions, versions
from vlm.training.runs.decoder_only import held_out_rows
from vlm.training.runs.launch import share_cores

PICTURES = 16
SCORERS = ("pycocoevalcap", "sacrebleu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is evaluated."""

    model: str
    """A run folder, a model folder or a hub id."""
    data: str = "sample:transfer"
    """Pictures with captions: any source that the recipes take."""
    rows: int | None = None
    """How many rows, spread evenly over the data; None takes all."""
    prompt: str | None = None
    """What asks for a caption in rows that hold a caption alone; None: the model's own prompt."""
    baseline: str | None = None
    """Pictures with captions whose nearest is the baseline's answer, such as sample:train."""
    baseline_vision: str = "demo"
    """The baseline's pretrained backbone: "demo", or "kind:id" as in the recipes."""
    baseline_px: tuple[int, int] | None = None
    """Rows and columns that the baseline brings pictures to; None keeps the backbone's own."""
    out: Path = Path("runs/eval-caption")
    """Where results go; earlier ones there are replaced."""
    batch: int = 16
    """Pictures captioned at once."""
    max_new_tokens: int = 32
    """Longest caption."""
    bad_rows: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read or are longer than the context: stop and name the row, or leave them
    out and count them. Rows without a picture or an answer are always left out and counted."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Boxes of COCO's files that cannot be one: stop, or lose these boxes."""
    ignore_keys: tuple[str, ...] = ()
    """Keys of rows that are left out although they change what a row means."""
    precision: Precision = "auto"
    """auto keeps the model's own where the device is fast in it, else takes fp32."""
    threads: int | None = None
    """CPU threads of each process; None shares the machine's cores among its processes."""


@dataclass(slots=True)
class Asked:
    """A picture to caption: the row that shows it first, and the references of all that do."""

    row: int
    name: str
    references: list[str] = field(default_factory=list)


def read_questions(
    source: Source, rows: Sequence[int], bad_rows: str, show: bool
) -> tuple[list[Asked], list[Skipped]]:
    """What is asked of which pictures, in the order of rows; and the rows that are left out."""
    asked: dict[bytes, Asked] = {}
    skipped: list[Skipped] = []
    for row in tqdm(rows, desc="reading rows", disable=not show or len(rows) < 1000, leave=False):
        name = source.row_name(row)
        try:
            example = source[row]
        except (BadRow, BadImage) as error:
            if bad_rows == "raise":
                raise
            skipped.append(Skipped(name, str(error)))
            continue
        if not example.answer.strip() or not example.question().images:
            missing = "answer" if not example.answer.strip() else "picture"
            skipped.append(Skipped(name, f"no {missing}"))
            continue
        question = asked.setdefault(_identity(example.question()), Asked(row, name))
        question.references.append(example.answer)
    return list(asked.values()), skipped


def _identity(question: Example) -> bytes:
    """Equal for questions of equal text about the same files or bytes."""
    digest = hashlib.sha256(repr(question.turns).encode())
    for image in question.images:
        held = isinstance(image.data, bytes)
        digest.update(hashlib.sha256(image.data if held else str(image.data).encode()).digest())
    return digest.digest()


def share(count: int, size: int, rank: int, ranks: int) -> Iterator[range]:
    """Batches of `size` (the last: what is left), dealt to ranks in turn, so that what a batch
    holds is the same for any number of ranks.

    >>> [list(batch) for batch in share(5, 2, 0, 2)], [list(batch) for batch in share(5, 2, 1, 2)]
    ([[0, 1], [4]], [[2, 3]])
    """
    for start in range(rank * size, count, ranks * size):
        yield range(start, min(start + size, count))


def from_all(accelerator: Accelerator, items: list) -> list:
    """The items of all processes, on every process, rank by rank."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def my_batches(accelerator: Accelerator, count: int, size: int, what: str) -> Iterator[range]:
    """This process's share of the batches; the main process shows a bar over all of them."""
    ranks, show = accelerator.num_processes, accelerator.is_main_process
    with tqdm(total=count, desc=what, disable=not show, leave=False) as bar:
        for batch in share(count, size, accelerator.process_index, ranks):
            yield batch
            bar.update(min(ranks * size, count - bar.n))


@torch.no_grad()
def write_captions(
    model: DecoderOnlyModel,
    source: Source,
    asked: Sequence[Asked],
    accelerator: Accelerator,
    settings: Settings,
) -> list[str | Skipped]:
    """What the model answers to each question, greedily; Skipped where it cannot be asked."""
    found: list[tuple[int, str | Skipped]] = []
    dtype = next(model.module.tokenizer.parameters()).dtype
    pad_id, ends = model.processor.pad_id, model.stop_ids
    with engine.evaluating(model.module):
        for batch in my_batches(accelerator, len(asked), settings.batch, "captions"):
            encoded: list[tuple[int, Row]] = []
            for i in batch:
                try:
                    question = source[asked[i].row].question()
                    encoded.append((i, model.processor.encode_prompt(question)))
                except (BadRow, BadImage) as error:
                    if settings.bad_rows == "raise":
                        raise
                    found.append((i, Skipped(asked[i].name, str(error))))
            if encoded:
                rows = collate([row for _, row in encoded], pad_id, "left").to(model.device, dtype)
                written = engine.generate(
                    model.module, rows, ends, pad_id, max_new_tokens=settings.max_new_tokens
                )
                for (i, _), (ids, _) in zip(encoded, written):
                    found.append((i, model.processor.decode(ids)))
    return [value for _, value in sorted(from_all(accelerator, found), key=lambda item: item[0])]


def looked_at(tokenizer: ImageTokenizer, example: Example) -> Row:
    """The views of an example's pictures, as this tokenizer takes them. Raises BadImage."""
    views = [
        (pixels, (number, view))
        for number, image in enumerate(example.images)
        for view, pixels in enumerate(tokenizer.pixel_spec(open_image(image)))
    ]
    nothing = torch.zeros(0, dtype=torch.long)
    return Row(name=example.name, ids=nothing, scored=nothing.bool(), views=tuple(views))


@torch.no_grad()
def pooled_features(tokenizer: ImageTokenizer, rows: Sequence[Row]) -> Tensor:
    """One unit vector for each row, fp32[B, D]: image tokens averaged over the grid, then over the
    views of the row's pictures."""
    parameter = next(tokenizer.parameters())
    sums = torch.zeros(len(rows), tokenizer.dim, device=parameter.device)
    for group in group_views(rows):
        group = group.to(parameter.device, parameter.dtype)
        images = tokenizer(group.pixels)
        tokens = images.tokens.float()
        if images.valid is None:
            means = tokens.mean(1)
        else:
            weights = images.valid.to(tokens)[..., None]
            means = (tokens * weights).sum(1) / weights.sum(1)
        sums.index_add_(0, group.owner[:, 0], means)
    return torch.nn.functional.normalize(sums, dim=1).cpu()


def nearest_rows(
    tokenizer: ImageTokenizer,
    source: Source,
    asked: Sequence[Asked],
    known: Source,
    accelerator: Accelerator,
    settings: Settings,
) -> tuple[list[int], list[Skipped]]:
    """For each picture asked about, the row of `known` with the nearest picture (the first of
    equals); and the rows of `known` that are left out."""
    found: list[tuple[int, Tensor]] = []
    for batch in my_batches(accelerator, len(asked), settings.batch, "features"):
        looked = [looked_at(tokenizer, source[asked[i].row].question()) for i in batch]
        found += zip(batch, pooled_features(tokenizer, looked))
    found = sorted(from_all(accelerator, found), key=lambda item: item[0])
    queries = torch.stack([vector for _, vector in found])
    best = torch.full((len(queries),), -torch.inf)
    rows = torch.full((len(queries),), -1)
    skipped: list[Skipped] = []
    for batch in my_batches(accelerator, len(known), settings.batch, "nearest neighbours"):
        usable, looked = [], []
        for row in batch:
            try:
                example = known[row]
                if not example.images or not example.answer.strip():
                    raise BadRow(f"{example.name}: no picture with an answer")
                looked.append(looked_at(tokenizer, example))
                usable.append(row)
            except (BadRow, BadImage) as error:
                if settings.bad_rows == "raise":
                    raise
                skipped.append(Skipped(known.row_name(row), str(error)))
        if usable:
            scores = queries @ pooled_features(tokenizer, looked).T
            top = scores.argmax(1)
            score = scores.gather(1, top[:, None])[:, 0]
            rows = torch.where(score > best, torch.tensor(usable)[top], rows)
            best = torch.maximum(best, score)
    all_best, all_rows = map(torch.stack, zip(*from_all(accelerator, [(best, rows)])))
    behind = all_best < all_best.max(0).values
    nearest = all_rows.masked_fill(behind, len(known)).min(0).values.tolist()
    if -1 in nearest:
        raise ValueError(f"{known.name}: expected rows with a picture and an answer, found none")
    return nearest, from_all(accelerator, skipped)


def evaluate(settings: Settings) -> dict[str, Any]:
    """One evaluation, from settings to results; they are also written to `settings.out`."""
    started = time.monotonic()
    require_least(settings, batch=1, rows=1, max_new_tokens=1, threads=1)
    require_writable(settings.out)
    options = {"bad_boxes": settings.bad_boxes, "ignore_keys": settings.ignore_keys}
    for spec in (settings.data, settings.baseline):  # before a model is opened, which gives prompts
        if spec is not None:
            open_source(spec, **options)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share_cores(accelerator, settings.threads)
    main = accelerator.is_main_process
    model = vlm.load(
        settings.model, device=str(accelerator.device), dtype=dtype_name(settings.precision)
    )
    prompt = model.caption_prompt if settings.prompt is None else settings.prompt
    source = open_source(settings.data, prompt=prompt, **options)
    known = settings.baseline and open_source(settings.baseline, prompt=prompt, **options)
    check_start([source] if known is None else [source, known], None, say_on(main))
    rows = held_out_rows(source, len(source) if settings.rows is None else settings.rows)
    asked, skipped = read_questions(source, rows, settings.bad_rows, main)
    captions = write_captions(model, source, asked, accelerator, settings)
    skipped += [caption for caption in captions if isinstance(caption, Skipped)]
    kept = [i for i, caption in enumerate(captions) if not isinstance(caption, Skipped)]
    asked, captions = [asked[i] for i in kept], [captions[i] for i in kept]
    if not asked:
        reason = f"{skipped[0].name}: {skipped[0].reason}"
        raise ValueError(f"{source.name}: none of {len(rows)} rows can be asked, such as {reason}")
    pairs = [(caption, one.references) for caption, one in zip(captions, asked)]
    result = {
        "model": settings.model,
        "data": source.name,
        "rows": len(rows),
        "prompt": prompt,
        "system": model.processor.system,
        "preprocessing": to_dict(model.processor.pixel_spec),
        "decoding": {**engine.GREEDY, "max_new_tokens": settings.max_new_tokens},
        "seed": None,  # nothing is drawn
        "batch": settings.batch,
        "dtype": str(next(model.module.text.parameters()).dtype).removeprefix("torch."),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "figures": caption_figures(pairs),
        "skipped": len(skipped),
        "examples_skipped": [f"{one.name}: {one.reason}" for one in skipped[:20]],
    }
    nearest: list[tuple[str, str]] | None = None
    if known is not None:
        tokenizer = load_vision(settings.baseline_vision, settings.baseline_px)
        tokenizer = tokenizer.float().to(accelerator.device)
        found, left_out = nearest_rows(tokenizer, source, asked, known, accelerator, settings)
        nearest = [(known.row_name(row), known[row].answer) for row in found]
        pairs_2 = [(caption, one.references) for (_, caption), one in zip(nearest, asked)]
        result["baseline"] = {
            "data": known.name,
            "vision": settings.baseline_vision,
            "preprocessing": to_dict(tokenizer.pixel_spec),
            "figures": caption_figures(pairs_2),
            "skipped": len(left_out),
        }
    result["versions"] = versions() | {name: version(name) for name in SCORERS}
    result["minutes"] = (time.monotonic() - started) / 60
    if main:
        write_results(settings.out, result, source, asked, pairs, nearest)
        show(result, settings.out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def write_results(
    out: Path,
    result: dict[str, Any],
    source: Source,
    asked: Sequence[Asked],
    pairs: Sequence[Pair],
    nearest: Sequence[tuple[str, str]] | None,
) -> None:
    """result.json, captions.jsonl and captions.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    scores, right = cider_d(pairs).tolist(), exact_matches(pairs).tolist()
    with (out / "captions.jsonl").open("w", encoding="utf-8") as file:
        for i, (one, (caption, references)) in enumerate(zip(asked, pairs)):
            line = {"row": one.name, "references": references, "caption": caption,
                    "exact_match": right[i], "cider_d": scores[i]}  # fmt: skip
            if nearest:
                line |= {"nearest": nearest[i][0], "nearest_caption": nearest[i][1]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    shown = range(0, len(asked), max(1, len(asked) // PICTURES))[:PICTURES]
    pictures = [open_image(source[asked[i].row].images[0]) for i in shown]
    true = [" / ".join(pairs[i][1][:3]) for i in shown]
    draw_captions(pictures, true, [pairs[i][0] for i in shown], out / "captions.png")


def show(result: dict[str, Any], out: Path) -> None:
    """The figures as a table, and where everything lies."""
    columns = {"model": result["figures"]}
    if "baseline" in result:
        columns["nearest neighbour"] = result["baseline"]["figures"]
    pictures = result["figures"]["pictures"]
    table = Table("figure", *columns, title=f"{pictures} pictures of {result['data']}")
    for name, what in (
        ("exact match", "exact_match"),
        ("CIDEr-D", "cider_d"),
        ("BLEU-4", "bleu_4"),
    ):
        cells = []
        for figures in columns.values():
            low, high = figures["exact_match_95"]
            bounds = f" ({low:.3f} to {high:.3f})" if what == "exact_match" else ""
            cells.append(f"{figures[what]:.3f}{bounds}")
        table.add_row(name, *cells)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    left_out = result["skipped"]
    console.print(f"{left_out} of {result['rows']} rows left out" + (":" if left_out else ""))
    for line in result["examples_skipped"][:5]:
        console.print(f"  {line}", markup=False)
    if result.get("baseline", {}).get("skipped"):
        console.print(f"{result['baseline']['skipped']} rows of the baseline left out")
    console.print(f"{out}: result.json, captions.jsonl, captions.png", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Settings from the command line; a fault of the input ends it with one line."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    try:
        evaluate(settings)
    except (ValueError, OSError, assets.FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
