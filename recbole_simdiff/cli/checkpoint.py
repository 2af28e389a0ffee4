"""The command on checkpoint files."""

import argparse
from pathlib import Path
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.serving.strip import strip


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``checkpoint``."""
    parser.usage = "%(prog)s strip --checkpoint=RUN --output=FILE"
    parser.description = (
        "strip writes a checkpoint without users, their histories and the state of training. It "
        "recommends to given histories, exports and serves as before; nothing else reads it."
    )
    parser.add_argument("--action", choices=("strip",), required=True, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder or file")
    parser.add_argument("--output", required=True, metavar="FILE", help=".safetensors file")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Write the file."""
    if overrides:
        raise UserError(
            f"checkpoint does not know --{next(iter(overrides))}; see checkpoint --help"
        )
    strip(namespace.checkpoint, Path(namespace.output))
    print(namespace.output)
    return 0
