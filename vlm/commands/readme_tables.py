"""What each published system can do here, as the table of README.md.

    python -m vlm.systems.capabilities              # prints it
    python -m vlm.systems.capabilities README.md    # writes it in place of the old one

Everything is read from the registry and from the systems' modules: a system's family is that of the
model which its `load` gives, what it can do are its family's tasks, and it is written back where
its module has `save`.
"""

from __future__ import annotations

import re
import sys
import typing
from importlib import import_module
from pathlib import Path

from vlm.families.registry import FAMILIES, SYSTEMS, Family

TASKS = {
    "caption": "caption",
    "answer": "answer",
    "chat": "chat",
    "ground": "ground",
    "ocr": "ocr",
    "embed": "embed_images",
    "classify": "classify",
}
"""Column of the table -> the method of a model that does it."""


def family_of(system: str) -> Family:
    """The family of a published system's models.

    Raises ValueError where the module's `load` does not say which model it gives.
    """
    module = import_module(SYSTEMS[system].module)
    given = typing.get_type_hints(module.load)["return"]
    for family in FAMILIES.values():
        if family.model_class is given:
            return family
    raise ValueError(f"{module.__name__}.load: expected the model of a family, found {given}")


def row(name: str, said: str, family: Family, saves: bool) -> str:
    """A line of the table. said: what the system is."""
    recipes = re.findall(r"recipes/\w+\.py", family.said)
    able = ["✓" if method in family.tasks else "" for method in TASKS.values()]
    train = ", ".join(f"[{path[8:-3]}]({path})" for path in recipes)
    return f"| {' | '.join([f'`{name}`', said, *able, train, '✓' if saves else ''])} |"


def table() -> str:
    """The systems by capability, in Markdown: first the families in our own layout, then the
    published systems."""
    head = ["system", "what it is", *TASKS, "train", "save back"]
    marks = ["---", "---", *[":---:"] * len(TASKS), "---", ":---:"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(marks)} |"]
    for name, family in FAMILIES.items():
        lines.append(row(name, "your own, composed of any parts", family, saves=True))
    for name, system in SYSTEMS.items():
        if name != "vlm":  # our own layout, of any family
            saves = hasattr(import_module(system.module), "save")
            lines.append(row(name, system.said, family_of(name), saves))
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page with the table in place of the one that it has: the lines from its head to the next
    that is empty.

    Raises ValueError where the page has not exactly one.
    """
    old = re.findall(r"^\| system \| what it is \|.*\n(?:\|.*\n)*", page, flags=re.MULTILINE)
    if len(old) != 1:
        raise ValueError(f"expected one table that begins with '| system |', found {len(old)}")
    return page.replace(old[0], table() + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
