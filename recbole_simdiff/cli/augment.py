"""The command that writes augmented data."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recbole_simdiff.cli.parser import add_data_arguments
from recbole_simdiff.cli.settings import command_config
from recbole_simdiff.errors import UserError
from recbole_simdiff.pipelines import diffuasr


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``augment``."""
    parser.description = (
        "Runs all stages of --model=DiffuASR but the last, and writes all interactions. A user's "
        "pseudo-items come before the real ones. Other --key=value override the configuration."
    )
    add_data_arguments(parser)
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Write the data that DiffuASR trains on."""
    namespace.model = "DiffuASR"
    path = Path(namespace.output)
    if path.suffix != ".inter":
        raise UserError(f"--output={path} must end in .inter, RecBole's atomic file")
    config = command_config(namespace, overrides)
    if "LS" not in config["eval_args"]["split"]:
        raise UserError(
            f"eval_args={config['eval_args']}: the file needs a leave-one-out split (LS). With "
            "another split, its test part would not be the one that is held out here"
        )
    diffuasr.export(diffuasr.augment(config), path)
    print(path)
    print("read it with rm_dup_inter=None and without filters by time", file=sys.stderr)
    return 0
