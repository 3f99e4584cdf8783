"""One line of text for every kind of source, so that a recipe's data are a list of strings."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import unquote

from vlm.data.example import BadSource
from vlm.data.sources.base import Source
from vlm.data.sources.clip_benchmark import ClipBenchmark
from vlm.data.sources.coco import CocoSource
from vlm.data.sources.documents import Documents
from vlm.data.sources.grounded import Grounded
from vlm.data.sources.json_rows import RowsSource
from vlm.data.sources.lists import TsvSource
from vlm.data.sources.row import RowFormat
from vlm.data.sources.shards import ShardSource
from vlm.data.sources.tables import TableSource, load_table

SAMPLE_FOLDER = Path(__file__).resolve().parent.parent / "sample"
SAMPLE_SPLITS = ("train", "val", "transfer")
OPTIONS = ("prompt", "image", "caption", "root", "config", "task", "bad_boxes")
ACCEPTED = """\
    sample:SPLIT                packaged drawings with captions: train, val, transfer
    scenes:COUNT:KEY=VALUE...   drawn scenes, such as scenes:1000:seed=3
    lines:COUNT:KEY=VALUE...    drawn lines of text, such as lines:1000:seed=3
    pages:COUNT:KEY=VALUE...    drawn pages of text, such as pages:10:seed=3
    PATH.jsonl, PATH.json       rows: image and conversations, messages or caption
    PATH.tsv                    TSV under a header: image and text
    coco:PATH.json              boxes in COCO's JSON; the images' folder after ?root=
    PATH.tar                    WebDataset shards; wildcards and {0000..0009} allowed
    PATH.parquet                a table
    FOLDER                      saved by datasets, or images with classes or metadata
    FOLDER:SPLIT                one split of it
    datasets:ORG/NAME:SPLIT     a hub set
    clip_benchmark:FOLDER:SPLIT WebDataset shards in CLIP_benchmark's layout
    PATH.txt                    plain text, paragraphs separated by empty lines
    python:SPLIT                plain text, Python's own manual: train, val"""
_SUFFIX = re.compile(r"\?(?=[a-z_]+=)")


def open_source(
    spec: str,
    *,
    prompt: str = "",
    image: str | None = None,
    caption: str | None = None,
    root: str | Path | None = None,
    config: str | None = None,
    task: str | None = None,
    many: bool = False,
    bad_boxes: str | None = None,
    ignore_keys: Collection[str] = (),
) -> Source:
    """The source that `spec` names, one of:

        sample:SPLIT                packaged drawings with captions: train, val, transfer
        scenes:COUNT:KEY=VALUE...   drawn scenes; keys are those of `Scenes.from_text`
        lines:COUNT:KEY=VALUE...    drawn lines; keys are those of `Lines.from_text`
        pages:COUNT:KEY=VALUE...    drawn pages; keys are those of `Pages.from_text`
        PATH.jsonl, PATH.json       rows, as in `vlm.data.sources.row`
        PATH.tsv                    TSV, as in `vlm.data.sources.lists`
        coco:PATH.json              detection data, as in `vlm.data.sources.coco`
        PATH.tar                    WebDataset shards; wildcards and {0000..0009} allowed
        PATH.parquet                a table
        FOLDER, FOLDER:SPLIT        saved by `datasets`, or images with classes or metadata
        datasets:ORG/NAME:SPLIT     a hub set
        clip_benchmark:FOLDER:SPLIT as in `vlm.data.sources.clip_benchmark`; SPLIT or else test
        PATH.txt                    plain text, paragraphs separated by empty lines
        python:SPLIT                plain text, Python's own manual: train, val

    Options are arguments, or stand after the text as ?KEY=VALUE&KEY=VALUE (percent-encoded where
    a value holds & or %), where they win over the arguments:

    prompt: the user's text after the image, in rows that are captions; may be "".
    image: key or column of the images; of tar shards, their extension. None: the usual ones.
    caption: key or column of the caption, making every row a caption. None: any form of row.
    root: where relative image paths start: a folder, or for rows of JSON or tabs and COCO's files
        a .tar file too. None: the folder of the rows.
    config: a hub set's configuration.
    task: "ground" asks where each label of a row's boxes is, in place of what the row says.
    bad_boxes: of COCO's files: "stop" (or None) refuses one with boxes that cannot be one, "skip"
        loses these boxes.
    many: whether a caption may be a list of texts; an argument only, as few uses can take it.
    ignore_keys: keys of rows that are skipped although they change what a row means (see
        `vlm.data.sources.keys`); an argument only.
    Raises BadSource where nothing opens, listing what is accepted.

    >>> open_source("scenes:10:seed=3")
    Scenes('scenes:10:seed=3', 10 rows)
    """
    text, *suffix = _SUFFIX.split(spec, maxsplit=1)
    options = {"prompt": prompt, "image": image, "caption": caption, "root": root}
    options |= {"config": config, "task": task, "bad_boxes": bad_boxes}
    own = _options(suffix[0], spec) if suffix else {}
    options |= own
    kind, open_kind = _kind(text, spec)
    # These arguments are for the sources that read them among others; after the text they are for
    # this one.
    given = {key for key, value in options.items() if value}
    given -= {"prompt"} - set(own) if kind in _WITHOUT_PROMPT else set()
    given -= {"bad_boxes"} - set(own) if kind != "coco" else set()
    unread = given - set(_READS[kind])
    if unread:
        raise BadSource(
            f"{spec}: {kind} takes the options {', '.join(_READS[kind])}, found {sorted(unread)}"
        )
    apart = {key: options.pop(key) for key in ("root", "config", "task", "bad_boxes")}
    task = apart.pop("task")
    if task not in (None, "ground"):
        raise BadSource(f"{spec}: expected the task ground, found {task!r}")
    form = RowFormat(**options, many=many, ignore=frozenset(ignore_keys))
    source = open_kind(text, form, **apart)
    return source if task is None else Grounded(source)


_READS = {
    "sample": ("prompt", "caption"),
    "scenes": ("prompt",),
    "lines": (),
    "pages": ("prompt",),
    "rows": ("prompt", "image", "caption", "root", "task"),
    "list": ("prompt", "image", "caption", "root"),
    "shards": ("prompt", "image", "caption", "task"),
    "table": ("prompt", "image", "caption", "root", "task"),
    "datasets": ("prompt", "image", "caption", "root", "config", "task"),
    "coco": ("root", "bad_boxes"),
    "clip_benchmark": ("prompt",),
    "python": (),
    "text": (),
}


_WITHOUT_PROMPT = ("lines", "coco", "python", "text")


def _kind(text: str, spec: str) -> tuple[str, Callable[..., Source]]:
    """The kind of source that a text names, and what opens it."""
    name, colon, _ = text.partition(":")
    suffix = Path(text).suffix.lower()
    if colon and name in _NAMED:
        return name, _NAMED[name]
    if suffix == ".tar":
        return "shards", lambda text, form, **_: ShardSource(text, form)
    if suffix == ".txt":
        return "text", lambda text, _, **__: Documents.from_file(text)
    if suffix in (".json", ".jsonl"):
        return "rows", lambda text, form, root, **_: RowsSource(text, form, image_root=root)
    if suffix == ".tsv":
        return "list", lambda text, form, root, **_: TsvSource(text, form, root)
    if suffix == ".parquet" or Path(_body_and_split(text)[0]).is_dir():
        return "table", _table
    raise BadSource(
        f"{spec}: expected a source, found neither a known kind nor a folder. "
        f"Accepted are:\n{ACCEPTED}"
    )


def _options(text: str, spec: str) -> dict[str, str]:
    options = {}
    for pair in text.split("&"):
        key, equals, value = pair.partition("=")
        if key not in OPTIONS or not equals:
            raise BadSource(f"{spec}: expected options of {', '.join(OPTIONS)}, found {pair!r}")
        options[key] = unquote(value)
    return options


def _sample(text: str, form: RowFormat, **_) -> Source:
    split = text.removeprefix("sample:")
    if split not in SAMPLE_SPLITS:
        raise BadSource(f"{text}: expected one of {', '.join(SAMPLE_SPLITS)}")
    return RowsSource(
        SAMPLE_FOLDER / f"{split}.jsonl", form, SAMPLE_FOLDER / f"{split}.tar", f"sample:{split}"
    )


def _scenes(text: str, form: RowFormat, **_) -> Source:
    from vlm.data.synthetic.scenes import Scenes  # which needs this package

    return Scenes.from_text(text.removeprefix("scenes:"), prompt=form.prompt)


def _lines(text: str, _, **__) -> Source:
    from vlm.data.synthetic.lines import Lines  # which needs this package

    return Lines.from_text(text.removeprefix("lines:"))


def _pages(text: str, form: RowFormat, **_) -> Source:
    from vlm.data.synthetic.pages import Pages  # which needs this package

    return Pages.from_text(text.removeprefix("pages:"), prompt=form.prompt)


def _table(text: str, form: RowFormat, root: str | Path | None, config: str | None, **_) -> Source:
    text = text.removeprefix("datasets:")
    body, split = _body_and_split(text)
    if not body:
        raise BadSource(
            f"datasets: expected ORG/NAME:SPLIT, found nothing. Accepted are:\n{ACCEPTED}"
        )
    table, folder = load_table(body, split, config)
    return TableSource(table, text, form, folder if root is None else root)


def _body_and_split(text: str) -> tuple[str, str | None]:
    if Path(text).exists():
        return text, None
    body, colon, split = text.rpartition(":")
    return (body, split) if colon else (text, None)


def _coco(text: str, _, root: str | Path | None, bad_boxes: str | None, **__) -> Source:
    return CocoSource(text.removeprefix("coco:"), root, bad_boxes or "stop")


def _clip_benchmark(text: str, form: RowFormat, **_) -> Source:
    folder, split = _body_and_split(text.removeprefix("clip_benchmark:"))
    return ClipBenchmark(folder, split or "test", form)


def _manual(text: str, _, **__) -> Source:
    return Documents.from_manual(text.removeprefix("python:"))


_NAMED = {
    "sample": _sample,
    "scenes": _scenes,
    "lines": _lines,
    "pages": _pages,
    "datasets": _table,
    "coco": _coco,
    "clip_benchmark": _clip_benchmark,
    "python": _manual,
}
