"""The command that evaluates a checkpoint."""

import argparse
from typing import Any

from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.cli.results import print_result
from recbole_simdiff.config.config import COMMAND_LINE
from recbole_simdiff.config.keys import EVALUATION_KEYS
from recbole_simdiff.runs.restore import evaluate


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``evaluate``."""
    parser.description = (
        "Validation and test of a checkpoint's model, as at the end of its training. These "
        f"--key=value of the configuration can be changed: {', '.join(EVALUATION_KEYS)}; for "
        "DreamRec also those of its generation."
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run folder or .safetensors file"
    )
    add_model_file(parser)


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Evaluate a checkpoint on its data set."""
    print_result(
        evaluate(namespace.checkpoint, overrides, origin=COMMAND_LINE, model=namespace.model_file)
    )
    return 0
