"""The names of a COCO file's categories, of which tools write some that name nothing.

Roboflow writes a root of all categories, with number 0, no box, and often the name of one of them;
other tools leave names out. A category that no box has can go without loss, and is said to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.data.example import BadSource
from vlm.data.sources.base import FIRST, Fault

NAMELESS = "categories without a name and without boxes, skipped"
TWICE = "categories without boxes and with another's name, skipped"
ROOT = "categories without boxes that the others belong to, skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """labels: the names that boxes have or may have, in the file's order. number: int64[N], the
    index in them of each category of the file, -1 where it has none. faults: what is skipped."""

    labels: tuple[str, ...]
    number: np.ndarray
    faults: tuple[Fault, ...]


def read_labels(categories: list[dict[str, Any]], used: np.ndarray, file: str) -> Labels:
    """The labels of a file's categories. used: int64[N], how many boxes each has.

    Raises BadSource where two that have boxes share a name, naming both.

    >>> root = {"id": 0, "name": "cup", "supercategory": "none"}
    >>> cup = {"id": 1, "name": "cup", "supercategory": "cup"}
    >>> found = read_labels([root, cup], np.array([0, 5]), "boxes.json")
    >>> found.labels, found.number.tolist(), str(found.faults[0])
    (('cup',), [-1, 0], "1 categories without boxes and with another's name, skipped: 0 ('cup')")
    """
    names = [_name_of(category) for category in categories]
    above = [category.get("supercategory") for category in categories]
    belonged_to = {name for name in above if isinstance(name, str)}
    kept: dict[str, int] = {}
    for i, name in enumerate(names):
        held = kept.get(name)
        if name is None or (held is not None and not used[i]):
            continue
        if held is not None and used[held]:
            ids = categories[held]["id"], categories[i]["id"]
            raise BadSource(
                f"{file}: category {ids[1]}: expected a name of its own, found {name!r}, which "
                f"is that of category {ids[0]}; {used[held]} boxes have the one and {used[i]} the "
                "other"
            )
        kept[name] = i
    gone: dict[str, list[int]] = {NAMELESS: [], TWICE: [], ROOT: []}
    for i, name in enumerate(names):
        if used[i]:
            continue
        if name is None:
            gone[NAMELESS].append(i)
        elif kept[name] != i:
            gone[TWICE].append(i)
        elif _is_root(categories[i]) and name in belonged_to:
            gone[ROOT].append(i)
            del kept[name]
    order = sorted(kept.values())
    number = np.full(len(names), -1, np.int64)
    number[order] = np.arange(len(order))
    faults = tuple(
        Fault(kind, len(at), tuple(_said(categories[i]) for i in at[:FIRST]))
        for kind, at in gone.items()
        if at
    )
    return Labels(labels=tuple(names[i] for i in order), number=number, faults=faults)


def _name_of(category: dict[str, Any]) -> str | None:
    name = category.get("name")
    return name if isinstance(name, str) and name.strip() else None


def _is_root(category: dict[str, Any]) -> bool:
    return category.get("supercategory") in (None, "", "none")


def _said(category: dict[str, Any]) -> str:
    return f"{category['id']} ({category.get('name')!r})"
