"""`vlm eval TASK MODEL`: the evaluations of `vlm.evaluation`, with the model as an argument."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a model on rows that it was not trained on.

    vlm eval TASK MODEL --data SOURCE; `vlm eval` lists the tasks, and `vlm eval TASK --help` says
    what can be set. On several processes:
    accelerate launch --num_processes 2 -m vlm.cli eval TASK MODEL
    """

    def run(self, arguments: list[str]) -> None:
        """arguments: the task, and what follows it.

        Raises ValueError for a task that there is not, and for input that cannot be evaluated.
        """
        from vlm.evaluation import TASKS, evaluation_class
        from vlm.evaluation.base import description, read_settings, run

        if not arguments or arguments[0] in ("-h", "--help"):
            print("usage: vlm eval TASK MODEL [options]\n")
            for name, task in TASKS.items():
                print(f"  {name:<12}{task.said}")
            print("\nvlm eval TASK --help says what can be set.")
            return
        task, *rest = arguments
        try:
            evaluation = evaluation_class(task)
        except ValueError as error:
            raise ValueError(f"vlm eval: {error}") from error
        settings = read_settings(
            with_model_argument(evaluation.settings_type),
            rest,
            description(evaluation),
            f"vlm eval {task}",
        )
        run(evaluation(settings))


def with_model_argument(settings_type: type) -> type:
    """Settings whose `model` is an argument on the command line, not an option."""
    (model,) = (field for field in dataclasses.fields(settings_type) if field.name == "model")
    required = model.default is dataclasses.MISSING
    kind = Annotated[
        str if required else str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="MODEL", help="A run folder, a model folder or a hub id."),
    ]
    default = dataclasses.field() if required else dataclasses.field(default=model.default)
    return dataclasses.make_dataclass(
        settings_type.__name__,
        [("model", kind, default)],
        bases=(settings_type,),
        frozen=True,
        kw_only=True,
    )
