"""The command line: exit codes and streams of all commands; each command has a file of its own."""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from recbole_simdiff.cli.messages import (
    USER_FIXABLE,
    discard_output,
    print_error,
    program,
    system_message,
)
from recbole_simdiff.cli.parser import COMMANDS, build_parser, parse, split
from recbole_simdiff.errors import (
    Interrupted,
    OutOfMemory,
    ProcessLost,
    TrainingDiverged,
    UserError,
)
from recbole_simdiff.log import terminal

PRINTING = ("evaluate", "recommend", "list")  # commands whose only result is their output


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (Sequence | None): its arguments; those of the process by default.

    Returns:
        int: the exit code: 0 success, 1 failure, 2 wrong input, 128 + number of the signal that
            stopped it.
    """
    _open_streams()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print_error(f"{_error()}: {error}")
        return 2
    except (TrainingDiverged, OutOfMemory, ProcessLost) as error:
        print_error(f"{_error()}: {error}")
        return 1
    except Interrupted as stop:
        command = f"{program()} --resume={shlex.quote(str(stop.run_dir))}{_own_file()}"
        command += f" --nproc={os.environ['WORLD_SIZE']}" if _is_distributed() else ""
        command = "the same command" if stop.same_command else command
        if _is_first():
            name = signal.Signals(stop.signum).name
            print_error(f"stopped by {name}; everything is saved. Continue with\n  {command}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        if _is_first():
            print_error("stopped; the last finished epoch of a run is saved")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        discard_output(sys.stdout, sys.stderr)
        return 128 + signal.SIGPIPE
    except (OSError, SafetensorError) as error:  # a folder that cannot be written, a full disk
        print_error(f"{_error()}: {system_message(error)}")
        discard_output(sys.stdout)
        return 2 if isinstance(error, OSError) and error.errno in USER_FIXABLE else 1


def _run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name; ``--help`` does not import torch."""
    arguments = split(arguments)
    name = arguments[0]
    if name not in COMMANDS:
        build_parser().parse_args(arguments)  # prints the help and ends the program
    command = importlib.import_module(f"recbole_simdiff.cli.{COMMANDS[name].module}")
    namespace, rest = parse(build_parser(name, command.add_arguments), arguments)
    if name in PRINTING and sys.__stdout__ is None:
        raise UserError(f"standard output is closed, and {name} only prints")
    if name != "train" and _is_distributed():
        raise UserError(f"{name} is a command for one process; only train can use several")
    with terminal():
        code: int = command.handle(namespace, _overrides(rest))
    sys.stdout.flush()
    return code


def _overrides(arguments: list[str]) -> dict[str, Any]:
    from recbole_simdiff.config.layers import parse_overrides  # here, so that --help is fast

    return parse_overrides(arguments)


def _is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    from recbole_simdiff import distributed  # here, so that --help is fast

    return distributed.is_distributed()


def _own_file() -> str:
    """The option that names the code of the user's own model, if one was trained."""
    from recbole_simdiff.models import own  # not for --help

    return "".join(f" --model_file={shlex.quote(path)}" for path in own.files_run())


def _is_first() -> bool:
    return not _is_distributed() or os.environ["RANK"] == "0"


def _error() -> str:
    """How error messages begin."""
    return f"process {os.environ['RANK']}: error" if _is_distributed() else "error"


def _open_streams() -> None:
    """Replace closed standard streams by the null device.

    Otherwise the next opened file would get the number of the closed stream, and receive the output
    of libraries.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
