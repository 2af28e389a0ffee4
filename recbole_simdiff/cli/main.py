"""The command line: one file a command; here their exit codes and the streams they write to."""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from recbole_simdiff.cli.messages import MENDABLE, abandon, program, system_message, tell
from recbole_simdiff.cli.parser import COMMANDS, build_parser, parse, split
from recbole_simdiff.errors import (
    Interrupted,
    OutOfMemory,
    ProcessLost,
    TrainingDiverged,
    UserError,
)
from recbole_simdiff.log import terminal

PRINTING = ("evaluate", "recommend", "list")  # commands that leave nothing but what they print


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (Sequence | None): its arguments; those of the process by default.

    Returns:
        int: the exit code: 0, 1 failed, 2 wrong input, 128 + signal stopped.
    """
    _open_streams()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        tell(f"{_failed()}: {error}")
        return 2
    except (TrainingDiverged, OutOfMemory, ProcessLost) as error:
        tell(f"{_failed()}: {error}")
        return 1
    except Interrupted as stop:
        again = f"{program()} --resume={shlex.quote(str(stop.run_dir))}{_own_file()}"
        again += f" --nproc={os.environ['WORLD_SIZE']}" if _several() else ""
        again = "the same command" if stop.same_command else again
        if _first():
            name = signal.Signals(stop.signum).name
            tell(f"stopped by {name}; everything is saved. Continue with\n  {again}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        if _first():
            tell("stopped; a run that had begun keeps its last finished epoch")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        abandon(sys.stdout, sys.stderr)
        return 128 + signal.SIGPIPE
    except (OSError, SafetensorError) as error:  # a folder that cannot be written, a full disk
        tell(f"{_failed()}: {system_message(error)}")
        abandon(sys.stdout)
        return 2 if isinstance(error, OSError) and error.errno in MENDABLE else 1


def _run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; ``--help`` is answered before torch is imported."""
    arguments = split(arguments)
    name = arguments[0]
    if name not in COMMANDS:
        build_parser().parse_args(arguments)  # --help, which ends the program
    command = importlib.import_module(f"recbole_simdiff.cli.{COMMANDS[name].module}")
    namespace, rest = parse(build_parser(name, command.add_arguments), arguments)
    if name in PRINTING and sys.__stdout__ is None:
        raise UserError(f"standard output is closed, and {name} only prints")
    if name != "train" and _several():
        raise UserError(f"{name} is a command for one process; train is not")
    with terminal():
        code: int = command.handle(namespace, _overrides(rest))
    sys.stdout.flush()
    return code


def _overrides(arguments: list[str]) -> dict[str, Any]:
    from recbole_simdiff.config.layers import parse_overrides  # not for --help

    return parse_overrides(arguments)


def _several() -> bool:
    """Whether this is one of several processes that train together."""
    from recbole_simdiff import distributed  # not for --help

    return distributed.is_distributed()


def _own_file() -> str:
    """The option that names the code of the user's own model, if one was trained."""
    from recbole_simdiff.models import own  # not for --help

    return "".join(f" --model_file={shlex.quote(path)}" for path in own.files_run())


def _first() -> bool:
    return not _several() or os.environ["RANK"] == "0"


def _failed() -> str:
    return f"process {os.environ['RANK']}: error" if _several() else "error"


def _open_streams() -> None:
    """Let a stream that the caller closed read nothing, and take what is written.

    A file opened later would get its number, and what libraries print would go into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
