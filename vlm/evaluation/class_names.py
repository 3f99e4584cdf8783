"""The class names and prompts of zero-shot classification: read from options, files and rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vlm.data.example import BadRow, Example
from vlm.data.sources import ClipBenchmark
from vlm.data.sources.base import Source
from vlm.families.contrastive.model import same_labels
from vlm.families.contrastive.processor import PairProcessor
from vlm.retrieval.embed_rows import only_image


class Classes(NamedTuple):
    """The classes that images are sorted into.

    name_of: from the labels that rows may have to the names of their classes.
    names: of all classes in their order. where: what lists them.
    """

    name_of: dict[str, str]
    names: list[str]
    where: str


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, none empty but at its end.

    Raises ValueError naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {what} in UTF-8, found other bytes") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: expected {what}, one a line, found none")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{path}:{number}: expected {what}, found an empty line")
    return lines


def read_templates(given: Sequence[str] | None, source: Source) -> tuple[str, ...]:
    """The prompts. Raises ValueError for one without a place for the name."""
    where = "--templates"
    if given is None:
        own = source.templates if isinstance(source, ClipBenchmark) else None
        return own or ("{}",)
    if len(given) == 1 and "{" not in given[0] and Path(given[0]).is_file():
        where, given = given[0], read_lines(Path(given[0]), "prompts")
    templates = tuple(template.strip().replace("{c}", "{}") for template in given)
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"{where}: expected {{}} at the name's place, found {wrong or 'nothing'}")
    return templates


def read_classes(path: Path | None, source: Source) -> Classes | None:
    """The classes that rows may have; None where neither a file nor the data list them.

    Raises ValueError for a name that is empty and a label with two names.
    """
    if path is not None:
        where, pairs = str(path), []
        for line in read_lines(path, "class names"):
            label, tab, name = line.partition("\t")
            if tab and not name.strip():
                raise ValueError(f"{path}:{len(pairs) + 1}: expected a name after {label!r}")
            pairs.append((label.strip(), name.strip() if tab else label.strip()))
    elif source.classes is not None:
        where, pairs = source.name, [(name, name) for name in source.classes]
    else:
        return None
    name_of: dict[str, str] = {}
    for label, name in pairs:
        if name_of.setdefault(label, name) != name:
            raise ValueError(f"{where}: expected each label once, found {label!r} with two names")
    return Classes(name_of, [name for _, name in pairs], where)


def told_apart(
    processor: PairProcessor, classes: Classes, templates: Sequence[str], same_names: str
) -> dict[str, str]:
    """From each name to the one that stands for it: itself, or the first that is the same text to
    the model.

    Raises ValueError for names that are the same, with their places in the list, unless
    `same_names` is "merge"; and for names of which the model reads nothing.
    """
    names = classes.names
    try:
        same = same_labels(processor, names, templates)
    except ValueError as error:
        raise ValueError(f"{classes.where}: {error}") from error
    if same and same_names == "raise":
        found = {
            " / ".join(dict.fromkeys(names[i] for i in places)): [i + 1 for i in places]
            for places in same
        }
        raise ValueError(
            f"{classes.where}: expected names that the model can tell apart, found the same at "
            f"several places of the list: {found}; --same-names merge takes them as one class"
        )
    stands = {name: name for name in names}
    return stands | {names[i]: names[places[0]] for places in same for i in places}


def read_label(classes: Classes | None, example: Example) -> str:
    """What a row says that its class is. Raises BadRow where it says nothing, or has not exactly
    one image, and for none of the classes, where there is a list of them."""
    only_image(example)
    answers = [turn.text.strip() for turn in example.turns if turn.role == "assistant"]
    if len(answers) != 1 or not answers[0]:
        found = f"{len(answers)} texts" if len(answers) != 1 else "an empty text"
        raise BadRow(f"{example.name}: expected one class, found {found}")
    if classes is not None and answers[0] not in classes.name_of:
        raise BadRow(
            f"{example.name}: expected one of the {len(classes.name_of)} classes of "
            f"{classes.where}, found {answers[0][:80]!r}"
        )
    return answers[0]
