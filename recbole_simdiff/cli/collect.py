"""The command that makes a table of single runs."""

import argparse
from pathlib import Path
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.collect import collect
from recbole_simdiff.experiments.report import write_tables_of_runs


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``collect``."""
    parser.usage = "%(prog)s RUN RUN ... [--reference=ROW] [--output=DIR]"
    parser.description = (
        "A table of finished runs, as Markdown, LaTeX and CSV. Runs that differ in the seed alone "
        "are one row: mean and standard deviation. Rows are compared with the reference by tests "
        "over users where all runs have rankings (--save_rankings=True)."
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="run folders")
    parser.add_argument("--reference", metavar="ROW", help="label of a row; the first by default")
    parser.add_argument(
        "--output", default="results/collected", metavar="DIR", help="default results/collected"
    )


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Write and print the table."""
    if overrides:
        raise UserError(f"collect does not know --{next(iter(overrides))}; see collect --help")
    folders = list(dict.fromkeys(Path(run) for run in namespace.runs))
    print(write_tables_of_runs(collect(folders, namespace.reference), Path(namespace.output)))
    print(f"\ntables: {namespace.output}")
    return 0
