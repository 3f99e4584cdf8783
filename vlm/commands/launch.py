"""`vlm launch`: accelerate's launcher, which ends by the recipe's own error line.

`accelerate launch` starts the processes of a run and then, where one of them ended by an error that
it has told, prints a traceback of its own below, of which nothing is the user's fault or help. A
child has no way to prevent that, so the launcher itself is called here, with the same options.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Run a recipe on one process or many: `accelerate launch` with its options, where an error is
    the recipe's own line and nothing below it.

    vlm launch --num_processes 2 recipes/stage1_adaptor.py --out runs/one
    """

    def run(self, arguments: list[str]) -> None:
        """arguments: accelerate's options, the recipe, and the recipe's options. Ends the program
        with the code of the process that failed."""
        from vlm.compat.accelerate import launch

        code, said = launch(arguments)
        if said:
            print(f"error: {said}", file=sys.stderr)
        if code:
            sys.exit(code)
