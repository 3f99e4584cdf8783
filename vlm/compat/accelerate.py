"""Insides of accelerate that are no public API, tested with 1.15: what `accelerate launch` tells
the processes that it starts (`vlm.training.runs.launch`)."""

import os


def asked_for_fsdp() -> bool:
    """Whether accelerate's configuration asks for FSDP; on CPUs it makes replicas of that."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def launch(arguments: list[str]) -> tuple[int, str]:
    """What `accelerate launch` does with its arguments: the exit code, and a line where a process
    ended without one of its own (by a signal); "" where it has said itself what was wrong.

    Source: accelerate 1.15, `commands/launch.py`: one process is a child of its own, several are
    torch's elastic agent in this one, whose log only repeats their exit codes.
    """
    import logging
    import signal
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A terminal sends Ctrl-C to the child as well, which saves and ends, and is waited for.
    signal.signal(signal.SIGINT, lambda *_: None)
    parser = launch_command_parser()
    parser.prog = "vlm launch"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(parser.parse_args(arguments))
    except SignalException as error:
        return 128 + error.sigval, ""
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    else:
        return 0, ""
    if code < 0:
        return 128 - code, f"a process of the run was ended by signal {-code}"
    return code, ""
