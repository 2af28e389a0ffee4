"""The command that writes rankings for other programs."""

import argparse
from pathlib import Path
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.lists import write_trec


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``trec``."""
    parser.usage = "%(prog)s RUN --output=DIR"
    parser.description = (
        "Writes the test rankings of a run (--save_rankings=True) as TREC run files, one a "
        "protocol, and the targets as qrels.trec, for trec_eval, ranx or ir_measures."
    )
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the files")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Write the files."""
    if overrides:
        raise UserError(f"trec does not know --{next(iter(overrides))}; see trec --help")
    for path in write_trec(Path(namespace.run), Path(namespace.output)):
        print(path)
    return 0
