"""The commands of `vlm`: those that ask a model for a task are rows of TASKS in
`vlm.families.registry`, the others stand here. Modules are named, not imported, so that looking at
the table loads nothing."""

from __future__ import annotations

from vlm import evaluation
from vlm.families.registry import TASKS, Command

OTHERS = (
    Command(
        "index",
        "vlm.commands.embedding:MakeIndex",
        "FOLDER --model RUN --out INDEX",
        "makes a folder's images searchable; again, reads what changed",
    ),
    Command(
        "retrieve",
        "vlm.commands.embedding:Retrieve",
        "INDEX QUERY",
        "finds images by text or by image, drawn with `--draw OUT.png`",
    ),
    Command(
        "eval",
        "vlm.commands.evaluation:Evaluate",
        "TASK MODEL --data SOURCE",
        f"evaluates: {', '.join(evaluation.TASKS)}; see [eval](eval/README.md)",
    ),
    Command(
        "check-data",
        "vlm.commands.check_data:CheckData",
        "SOURCE... [--rows N]",
        "says what is wrong in data before anything is trained on them, see "
        "[vlm/data](vlm/data/README.md)",
    ),
    Command(
        "inspect-batch",
        "vlm.commands.inspect_batch:InspectBatch",
        "recipes/stage1_adaptor.py [settings]",
        "prints the rows that a recipe would train on: scored tokens, image runs, masks, boxes",
    ),
    Command(
        "plan",
        "vlm.commands.plan:MakePlan",
        "recipes/stage1_adaptor.py --machine 8xH100-80G [settings]",
        "what a run takes: memory by part, the largest micro-batch, time and price",
    ),
    Command(
        "launch",
        "vlm.commands.launch:Launch",
        "...",
        "`accelerate launch`, whose last line is the recipe's own error",
    ),
    Command(
        "export",
        "vlm.commands.export:Export",
        "RUN --out FOLDER [--step N]",
        "the model of any checkpoint of a run, in our own or the published layout; no GPU",
    ),
    Command(
        "fetch",
        "vlm.commands.fetch:Fetch",
        "demo",
        "fetches the default weights, with a progress bar and a checksum, into a cache",
    ),
    Command(
        "systems",
        "vlm.commands.systems:Systems",
        "",
        "lists what can be opened, composed and fetched",
    ),
)


def all_commands() -> tuple[Command, ...]:
    """Every command, in the order of README.md's table."""
    return (*TASKS.values(), *OTHERS)
