"""The one table of what there is: families of model, what they do, and published systems of each.

A family is a folder here and a row of FAMILIES; a task is a method of its model and, where the
command line has it, a row of TASKS; a published system is a file of `vlm/systems` and a row of
SYSTEMS. Modules are named, not imported, so that looking at the table loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple


def named(place: str) -> Any:
    """What MODULE:NAME names; imports the module."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class Command(NamedTuple):
    """A command of the command line, and its line in README.md.

    name: what stands after `vlm`. options: MODULE:CLASS of its options, whose `run` does it.
    usage: an example of what stands after the name. said: what it does, in Markdown.
    """

    name: str
    options: str
    usage: str
    said: str


TASKS = {
    "caption": Command(
        "caption", "vlm.commands.decoding:Caption", "IMAGE... --model RUN", "captions images"
    ),
    "answer": Command(
        "answer",
        "vlm.commands.decoding:Answer",
        "IMAGE... --question TEXT --model RUN",
        "answers a question about each image, or `--together` one about all",
    ),
    "chat": Command(
        "chat",
        "vlm.commands.decoding:Chat",
        "[IMAGE...] --model RUN",
        "talks about images, each encoded once; answers appear as they are written",
    ),
    "ground": Command(
        "ground",
        "vlm.commands.decoding:Ground",
        "IMAGE PHRASE... --model RUN",
        "finds phrases: boxes with scores, drawn with `--draw OUT.png`",
    ),
    "ocr": Command(
        "ocr",
        "vlm.commands.ocr:Ocr",
        "IMAGE_OR_PDF... [--model RUN]",
        "reads text: plain, JSON, hOCR or ALTO, see [vlm/ocr](vlm/ocr/README.md)",
    ),
    "embed_images": Command(
        "embed",
        "vlm.commands.embedding:Embed",
        "IMAGE_OR_FOLDER... --model RUN --out FILE.npz",
        "vectors of images or texts",
    ),
    "classify": Command(
        "classify",
        "vlm.commands.embedding:Classify",
        "IMAGE... --labels TEXT... --model RUN",
        "says which label fits each image",
    ),
}
"""Method of a model that does what people ask for -> the command that asks for it. The command's
name is a column of README.md's table of systems."""

WRITING = ("caption", "answer", "chat", "ground", "generate", "score")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family of model.

    said: what messages call it. model: MODULE:CLASS of its public model. layout: the module that
        opens and writes it in our own layout. inspect: the module that shows its rows, see
        `vlm.families.inspect`. tasks: the methods of the model that do what people ask for, those
        of TASKS and those without a command. layouts: published layouts that any of its models may
        be saved in.
    """

    said: str
    model: str
    layout: str
    inspect: str
    tasks: tuple[str, ...]
    layouts: tuple[str, ...] = ()

    @property
    def model_class(self) -> type:
        """The class of its public model."""
        return named(self.model)


FAMILIES = {
    "decoder_only": Family(
        said="decoder_only (LLaVA, what recipes/stage1_adaptor.py and recipes/finetune.py train)",
        model="vlm.families.decoder_only.model:DecoderOnlyModel",
        layout="vlm.families.decoder_only.layout",
        inspect="vlm.families.decoder_only.inspect",
        tasks=WRITING,
    ),
    "prefix_decoder": Family(
        said="prefix_decoder (PaliGemma, what recipes/paligemma.py trains)",
        model="vlm.families.prefix_decoder.model:PrefixDecoderModel",
        layout="vlm.families.prefix_decoder.layout",
        inspect="vlm.families.decoder_only.inspect",
        tasks=(*WRITING, "ocr"),
    ),
    "cross_attended": Family(
        said="cross_attended (Mllama, Flamingo, what recipes/stage1_adaptor.py with --cross-every "
        "and recipes/finetune.py train)",
        model="vlm.families.cross_attended.model:CrossAttendedModel",
        layout="vlm.families.cross_attended.layout",
        inspect="vlm.families.decoder_only.inspect",
        tasks=WRITING,
    ),
    "contrastive": Family(
        said="contrastive (CLIP, SigLIP, what recipes/contrastive.py trains)",
        model="vlm.families.contrastive.model:ContrastiveModel",
        layout="vlm.families.contrastive.layout",
        inspect="vlm.families.contrastive.inspect",
        tasks=("embed_images", "embed_texts", "classify"),
        layouts=("open_clip",),
    ),
    "encoder_decoder": Family(
        said="encoder_decoder (TrOCR, Donut, what recipes/trocr.py trains)",
        model="vlm.families.encoder_decoder.model:EncoderDecoderModel",
        layout="vlm.families.encoder_decoder.layout",
        inspect="vlm.families.encoder_decoder.inspect",
        tasks=("ocr", "read_lines", "generate", "score"),
    ),
    "line_reader": Family(
        said="line_reader (the one that is shipped, what recipes/line_reader.py trains)",
        model="vlm.families.line_reader.model:LineReaderModel",
        layout="vlm.families.line_reader.layout",
        inspect="vlm.families.line_reader.inspect",
        tasks=("ocr", "read_lines"),
    ),
}
"""Name of a family, as config.json has it -> what there is of it."""


class System(NamedTuple):
    """A published system: the module that opens and writes its folders, and what it is."""

    module: str
    said: str


SYSTEMS = {
    "vlm": System(
        "vlm.families.decoder_only.layout", "any image tokenizer and text model, our own layout"
    ),
    "deepseek_vl": System("vlm.systems.deepseek_vl", "DeepSeek-VL 1.3B: SigLIP, MLP, LLaMA"),
    "deepseek_vl_hybrid": System(
        "vlm.systems.deepseek_vl", "DeepSeek-VL 7B: SigLIP and SAM, LLaMA"
    ),
    "clip": System("vlm.systems.clip", "CLIP: two towers, softmax loss"),
    "siglip": System(
        "vlm.systems.siglip", "SigLIP, SigLIP 2 at fixed sizes: two towers, sigmoid loss"
    ),
    "open_clip": System("vlm.systems.open_clip.layout", "CLIP and SigLIP in open_clip's layout"),
    "siglip2": System("vlm.systems.siglip2", "SigLIP 2 NaFlex: images at their own aspect ratio"),
    "trocr": System("vlm.systems.trocr", "TrOCR: ViT, DeiT or BEiT, text decoder; lines of text"),
    "donut": System("vlm.systems.donut", "Donut: Swin, mBART decoder; documents to JSON"),
    "paligemma": System(
        "vlm.systems.paligemma", "PaliGemma 1 and 2: SigLIP, linear, Gemma, prefix mask"
    ),
    "llava": System("vlm.systems.llava", "LLaVA 1.5: CLIP, MLP, LLaMA"),
    "llava_next": System(
        "vlm.systems.llava", "LLaVA-NeXT (1.6): CLIP tiles of any resolution, MLP, LLaMA or Mistral"
    ),
    "idefics2": System(
        "vlm.systems.idefics2", "Idefics2: SigLIP at an image's own size, perceiver, Mistral"
    ),
    "idefics3": System("vlm.systems.smolvlm", "Idefics3, SmolVLM: tagged SigLIP tiles, LLaMA"),
    "smolvlm": System("vlm.systems.smolvlm", "SmolVLM2: tagged SigLIP tiles or frames, LLaMA"),
    "qwen2_vl": System(
        "vlm.systems.qwen2_vl", "Qwen2-VL on images: any size, 2-D rotary ViT, Qwen2 with M-RoPE"
    ),
    "qwen2_5_vl": System(
        "vlm.systems.qwen2_vl", "Qwen2.5-VL on images: any size, windowed ViT, Qwen2.5 with M-RoPE"
    ),
    "qwen": System("vlm.systems.qwen_vl", "Qwen-VL (the original): ViT-bigG, 256 queries, Qwen"),
    "mllama": System(
        "vlm.systems.mllama",
        "Mllama (Llama 3.2 Vision): tiles of a canvas, LLaMA with gated blocks",
    ),
    "idefics": System(
        "vlm.systems.idefics",
        "Idefics v1 (open Flamingo): CLIP, perceiver, LLaMA with gated blocks",
    ),
    "kosmos-2": System(
        "vlm.systems.kosmos2", "Kosmos-2: CLIP, 64 latents, Magneto; patch indices as places"
    ),
}
"""`format` or transformers' `model_type` in config.json -> the system. A folder whose configuration
is open_clip_config.json is "open_clip"; one of transformers' VisionEncoderDecoderModel is "donut"
or "trocr", by its encoder."""


def families_that(task: str) -> list[str]:
    """The names of the families whose models do a task; none for what is no task."""
    return [name for name, family in FAMILIES.items() if task in family.tasks]


def model_of(*, module: Any, **fields: Any) -> Any:
    """The public model of a module, by its family. fields: of its class."""
    return FAMILIES[module.family].model_class(module=module, **fields)


def save_in(model: Any, kind: str, folder: Any) -> None:
    """Writes a model in the layout of a published system."""
    import_module(SYSTEMS[kind].module).save(model, folder)
