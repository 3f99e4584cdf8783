"""A run that teaches reading: what it can be told, and its way from settings to result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoTokenizer

from vlm.data.mixture import Mixture, MixtureDataset, check_weights
from vlm.data.sources.base import Source
from vlm.data.synthetic.lines import characters_of
from vlm.draw import draw_lines
from vlm.families.encoder_decoder import layout as transcriber
from vlm.families.encoder_decoder import swap_text_tokenizer as swap
from vlm.families.encoder_decoder.layout import DecoderSizes
from vlm.families.encoder_decoder.processor import Transcriber
from vlm.families.line_reader import layout as line_reader
from vlm.inference.ocr import LineModel
from vlm.inference.tasks import FACES
from vlm.metrics.text import Comparison, compare_texts
from vlm.pixels import open_image
from vlm.systems.published import open_part
from vlm.tokenizers.columns import ColumnsConfig, ColumnsTokenizer, line_spec
from vlm.training.base_settings import BaseSettings, require_share
from vlm.training.objectives.base import Objective
from vlm.training.run_folder import Curves
from vlm.training.runs.run import Course, MakeStage
from vlm.vocabulary import character_tokenizer

NEW = "new"
ENDLESS = 1_000_000_000
WORST = 24
"""Lines on the page of the worst."""
ERRORS = Curves(
    "nats per character",
    "held-out lines",
    "error rate",
    "lines",
    (("cer", "#1f4e8c", "characters"), ("wer", "#b5532a", "words")),
)


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(BaseSettings):
    """Settings of any run that teaches reading. A subclass says what is built."""

    alphabet: str = "english"
    """Characters that are read: english, latin, cyrillic, greek, or a text file that holds them."""
    language: str = "english"
    """What drawn lines say: english (Python's documentation), a text file in the language, or the
    name that the package faker has for it, such as ru_RU or el_GR."""
    fonts: str = "any"
    """Fonts of drawn lines: any, train, system, families of fontpkg, folders or files, parted by
    commas. Those that lack letters of the alphabet are left out."""
    train: tuple[str, ...] = ()
    """Training data, any number of: lines:COUNT:KEY=VALUE, PATH.tsv, FOLDER, PATH-{0000..0009}.tar,
    PATH.jsonl. None: drawn lines in the language, endlessly many."""
    held_out: str = ""
    """Lines to evaluate on. None: drawn lines in the language that training never draws."""
    weight_decay: float = 0.02
    floor: float = 0.02
    batch: int = 64
    eval_every: int = 500
    save_every: int = 500

    def characters(self) -> str:
        """The characters that are read.

        Raises ValueError for an alphabet that is neither a name nor a file.
        """
        return characters_of(self.alphabet)

    def drawn(self, count: int, seed: int, split: str) -> str:
        """The source of drawn lines in the settings' language."""
        return (
            f"lines:{count}:seed={seed}:fonts={self.fonts}:alphabet={self.alphabet}"
            f":text={self.language}:split={split}"
        )

    def data(self) -> MixtureDataset:
        require_share("warmup", self.warmup)
        if self.augment != "none":
            raise ValueError(
                f"augment {self.augment!r}: expected none, as windows would cut letters off a "
                "line; drawn lines are worn already"
            )
        specs = self.train or (self.drawn(ENDLESS, self.seed + 1, "train"),)
        sources = [self.open(spec) for spec in specs]
        if self.weights is not None:
            check_weights(self.weights, [source.name for source in sources])
        mixture = Mixture(sources, self.weights, self.seed)
        return MixtureDataset(sources, mixture, self.bad_rows)

    def held_out_source(self) -> Source:
        """What is evaluated on."""
        return self.open(self.held_out or self.drawn(self.held_out_rows, 0, "validation"))


@dataclass(frozen=True, kw_only=True)
class LineReaderSettings(ReadingSettings):
    """Settings of a run that trains a line reader: a fresh one, or one to go on from."""

    out: Path = Path("runs/line_reader")
    start: str = NEW
    """new, or a line reader to go on from: "line-reader" (the shipped one), a run or a folder.
    Characters that it lacks are added to it, and its strokes are kept."""
    height_px: int = 32
    """Rows that a line of a new reader is brought to."""
    width: int = 192
    """Width of a new reader's tokens, a multiple of 64."""
    depth: int = 6
    """Its layers along the line."""
    rate: float = 1.5e-3
    """Peak learning rate."""
    steps: int = 2000

    def build(self) -> line_reader.ReaderParts:
        """The reader to train."""
        characters = self.characters()
        if self.start == NEW:
            return line_reader.build(
                characters,
                height_px=self.height_px,
                width=self.width,
                layers=self.depth,
                seed=self.seed,
            )
        import vlm

        parts = vlm.load(self.start, device="cpu", dtype="float32").parts
        if not isinstance(parts, line_reader.ReaderParts):
            raise ValueError(
                f"start {self.start!r}: expected a line reader, found a {parts.module.family} model"
            )
        known = parts.processor.characters
        new = "".join(c for c in characters if c not in known)
        return line_reader.with_characters(parts, known + new, self.seed)


@dataclass(frozen=True, kw_only=True)
class TranscriberSettings(ReadingSettings):
    """Settings of a run that trains an encoder-decoder reader (TrOCR's way): one to go on from, or
    one of an image tokenizer and a text decoder."""

    out: Path = Path("runs/trocr")
    start: str | None = None
    """A model to go on from: TrOCR's folder or hub id, a run, or a folder of our own layout."""
    vision: str = NEW
    """The image tokenizer, where there is none to go on from: new (a small net for lines),
    "kind:id" of a pretrained one, or the folder of a model or run, such as one of
    recipes/line_reader.py."""
    decoder: str = NEW
    """The text decoder, where there is none to go on from: new, or the hub id or folder of a text
    model (BERT, RoBERTa, GPT-2 and their like), which gets fresh cross-attention."""
    tokenizer: str = "own"
    """own (the decoder's), characters (one token for each character of the alphabet), or the hub id
    or folder of one. Tokens that the decoder knows already keep what they learned."""
    line_px: tuple[int, int] | None = None
    """Rows and most columns that a pretrained encoder of squares sees instead: lines keep their
    shape, and positions are resized. Such as 64 1024."""
    decoder_width: int = 256
    """Width of a new decoder."""
    decoder_depth: int = 3
    """Its layers."""
    length: int = 96
    """The most tokens of a text of a new decoder."""
    vision_rate: float = 5e-4
    """Peak learning rate of the image tokenizer."""
    decoder_rate: float = 1e-3
    """Peak learning rate of the decoder and of what joins the two."""
    steps: int = 2000

    def build(self) -> Transcriber:
        """The model to train. Raises ValueError for settings that do not go together."""
        if self.start is not None:
            parts = self._loaded()
        else:
            if self.decoder == NEW and self.tokenizer == "own":
                tokenizer = character_tokenizer(self.characters())
            else:
                tokenizer = self._tokenizer() if self.decoder == NEW else None
            sizes = DecoderSizes(
                width=self.decoder_width,
                depth=self.decoder_depth,
                heads=max(1, self.decoder_width // 64),
                mlp_width=4 * self.decoder_width,
                length=self.length,
            )
            parts = transcriber.build(
                vision=_new_vision(self.seed) if self.vision == NEW else self.vision,
                text=sizes if self.decoder == NEW else self.decoder,
                text_tokenizer=tokenizer,
                prefix="drop" if self.vision == NEW else "keep",
                seed=self.seed,
            )
        if self.tokenizer != "own" and not (self.start is None and self.decoder == NEW):
            parts = swap.with_tokenizer(parts, self._tokenizer(), self.seed)
        if self.line_px is None:
            return parts
        tokenizer, spec = parts.module.tokenizer, parts.processor.pixel_spec
        patch_px = spec.patch_px  # None where all views are of one size
        if patch_px is None:
            patch_px = spec.size_hw[1] // tokenizer.shapes_for(spec.size_hw)[0].grid_hw[1]
        return parts.with_size(self.line_px, fit="height", patch_px=patch_px)

    def _loaded(self) -> Transcriber:
        import vlm

        parts = vlm.load(self.start, device="cpu", dtype="stored").parts
        if not isinstance(parts, Transcriber):
            raise ValueError(
                f"start {self.start!r}: expected an encoder-decoder model, found a "
                f"{parts.module.family} one"
            )
        return parts

    def _tokenizer(self) -> Any:
        if self.tokenizer == "characters":
            return character_tokenizer(self.characters())
        return open_part(AutoTokenizer, Path(self.tokenizer))


def _new_vision(seed: int) -> ColumnsTokenizer:
    """A fresh image tokenizer for lines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ColumnsTokenizer(ColumnsConfig(pixel_spec=line_spec(32)))


def run(
    settings: ReadingSettings,
    make_stage: MakeStage,
    make_objective: Callable[[LineModel], Objective],
) -> dict[str, Any]:
    """One run from settings to result: trains, evaluates on held-out lines, saves."""
    course = Course(settings, ERRORS)
    accelerator = course.accelerator
    data = settings.data()
    held_out = settings.held_out_source() if settings.held_out_rows else None
    course.check(data, held_out, reads_prompts=not isinstance(settings, LineReaderSettings))
    with accelerator.main_process_first():
        parts = settings.build()
        model = FACES[parts.module.family](parts)
    plan = course.stage(make_stage, model.module)
    rows, left_out, _ = course.held_out(model, held_out)
    quarter = rows[::4]

    def evaluate() -> dict[str, float]:
        return errors_on(model, held_out, quarter, accelerator).result().figures()

    progress = course.train(
        model, plan, data, make_objective(model), evaluate if rows else None, evaluated=bool(rows)
    )
    more: dict[str, Any] = {}
    if rows:
        examples = [held_out[row] for row in rows]
        with accelerator.autocast():
            temperatures = model.fit_temperatures(
                [open_image(example.images[0]) for example in examples],
                [example.answer for example in examples],
            )
        more["temperatures"] = dataclasses.asdict(temperatures)
        course.save(model)
    found = errors_on(model, held_out, rows, accelerator) if rows else None
    if found:
        more |= {"held_out": held_out.name, "held_out_skipped": left_out}

    def show(result: dict[str, Any]) -> None:
        if found:
            _draw_worst(found, held_out, rows, settings.out / "worst_lines.png")
        _report(course, result, found)

    return course.end(progress, found.result().figures() if found else {}, more, show)


def errors_on(
    model: LineModel, source: Source, rows: Sequence[int], accelerator: Accelerator
) -> Comparison:
    """What the model reads of rows, beside what stands there; the same on any number of ranks."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    examples = [source[row] for row in rows[rank::ranks]]
    with accelerator.autocast():
        read = model.read_lines([open_image(example.images[0]) for example in examples])
    mine = [(e.answer, transcript.text) for e, transcript in zip(examples, read)]
    by_rank = gather_object([mine]) if ranks > 1 else [mine]
    pairs: list[tuple[str, str]] = [("", "")] * len(rows)
    for other, theirs in enumerate(by_rank):
        pairs[other::ranks] = theirs
    return compare_texts(*zip(*pairs))


def _draw_worst(found: Comparison, source: Source, rows: Sequence[int], path: Path) -> None:
    order = sorted(range(len(rows)), key=lambda i: -found.line_cer[i])[:WORST]
    draw_lines(
        [open_image(source[rows[i]].images[0]) for i in order],
        [found.truths[i] for i in order],
        [found.reads[i] for i in order],
        path,
        [source.row_name(rows[i]) for i in order],
    )


def _report(course: Course, result: dict[str, Any], found: Comparison | None) -> None:
    """The run's result, for people."""
    out, say = course.settings.out, course.say
    course.say_left_out(result)
    say(f"{out}: loss.png, worst_lines.png, metrics.jsonl, model/", highlight=False)
    if found is None:
        return
    pairs = ", ".join(f"{c.truth!r} as {c.read!r} ({c.count})" for c in found.confusions(8))
    say(f"most often misread: {pairs or 'nothing'}", highlight=False, markup=False)
    say(
        f"{result['held_out']}, {result['lines']} lines: CER {result['cer']:.2%} "
        f"({result['cer_95'][0]:.2%} to {result['cer_95'][1]:.2%}), WER {result['wer']:.2%}, "
        f"lines without a fault {result['exact_match']:.1%}",
        style="bold",
        highlight=False,
        markup=False,
    )
