"""The tables of README.md that follow from others here: what each system can do, and the commands.

    python -m vlm.commands.readme_tables              # prints them
    python -m vlm.commands.readme_tables README.md    # writes them in place of the old ones

Systems are read from the registry and from their modules: a system's family is that of the model
which its `load` gives, what it can do are its family's tasks, and it is written back where its
module has `save`.
"""

from __future__ import annotations

import re
import sys
import typing
from importlib import import_module
from pathlib import Path

from vlm.commands import all_commands
from vlm.families.registry import FAMILIES, SYSTEMS, TASKS, Family


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


def systems_table() -> str:
    """The systems by what they can do, in Markdown: first the families in our own layout, then the
    published systems."""
    tasks = [command.name for command in TASKS.values()]
    head = ["system", "what it is", *tasks, "train", "save back"]
    marks = ["---", "---", *[":---:"] * len(tasks), "---", ":---:"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(marks)} |"]
    for name, family in FAMILIES.items():
        lines.append(_system(name, "your own, composed of any parts", family, saves=True))
    for name, system in SYSTEMS.items():
        if name != "vlm":  # our own layout, of any family
            saves = hasattr(import_module(system.module), "save")
            lines.append(_system(name, system.said, family_of(name), saves))
    return "\n".join(lines)


def _system(name: str, said: str, family: Family, saves: bool) -> str:
    """A line of the table. said: what the system is."""
    recipes = re.findall(r"recipes/\w+\.py", family.said)
    able = ["✓" if method in family.tasks else "" for method in TASKS]
    train = ", ".join(f"[{path[8:-3]}]({path})" for path in recipes)
    return f"| {' | '.join([f'`{name}`', said, *able, train, '✓' if saves else ''])} |"


def commands_table() -> str:
    """The commands, in Markdown."""
    lines = ["| command | what it does |", "| --- | --- |"]
    for command in all_commands():
        line = f"vlm {command.name} {command.usage}".rstrip()
        lines.append(f"| `{line}` | {command.said} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """A page with both tables in place of those that it has: the lines from a table's head to the
    next that is empty.

    Raises ValueError where the page has not exactly one of each.
    """
    for table in (systems_table(), commands_table()):
        first, second, *_ = (cell.strip() for cell in table.strip("| ").split("|"))
        head = f"| {first} | {second} |"
        old = re.findall(rf"^{re.escape(head)}.*\n(?:\|.*\n)*", page, flags=re.MULTILINE)
        if len(old) != 1:
            raise ValueError(f"expected one table that begins with '{head}', found {len(old)}")
        page = page.replace(old[0], table + "\n")
    return page


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(systems_table(), commands_table(), sep="\n\n")
