"""The command that repeats a run."""

import argparse
import json
from pathlib import Path
from typing import Any

from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.execute import DONE, LINES
from recbole_simdiff.models.registry import accept
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.runs.record import Figure, circumstances, figures, repeated_config
from recbole_simdiff.runs.result import RunResult, aligned, read_result, result_of


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``replay``."""
    parser.usage = "%(prog)s RUN [--data_path=DIR] [--checkpoint_dir=DIR]"
    parser.description = (
        "Trains a finished run again in a new folder, with the settings of its record, and "
        "compares all metrics. Exit code 0: every figure is equal to the last bit; 1: some differ. "
        "Other --key=value may say where it runs and what is shown, such as data_path and "
        "checkpoint_dir."
    )
    parser.add_argument(
        "--run", required=True, metavar="RUN", help=f"run folder, or a line N of FILE/{LINES}:N"
    )
    add_model_file(parser)


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Repeat a run and compare."""
    before = finished_run(namespace.run)
    accept(namespace.model_file)
    after = start(repeated_config(before, overrides))
    compared = figures(before, after)
    differing = [figure for figure in compared if not figure.equal]
    for text in circumstances(before, after):
        print(f"another {text}")
    if differing:
        print(f"{len(differing)} of {len(compared)} figures differ:\n{_table(differing)}")
    else:
        print(f"all {len(compared)} figures are equal")
    print(f"repetition of {namespace.run}: {after.run_dir}")
    return 1 if differing else 0


def finished_run(place: str) -> RunResult:
    """The result of a run folder or of a line of an experiment's records.

    Args:
        place (str): a run folder, or ``FILE.jsonl:N`` for line N of the file, from 1.

    Raises:
        UserError: if there is no finished run.
    """
    path, _, number = place.rpartition(":")
    if path.endswith(".jsonl"):
        return _line(Path(path), number)
    folder = Path(place)
    if (folder / LINES).is_file() or folder.suffix == ".jsonl":
        file = folder / LINES if folder.is_dir() else folder
        raise UserError(f"{file} holds many runs; name one by its line: {file}:N, N from 1")
    return read_result(folder)


def _line(path: Path, number: str) -> RunResult:
    try:
        lines = dict(enumerate(path.read_text().splitlines(), start=1))
        entry = json.loads(lines[int(number)])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{path}:{number} is not a line of results; after the colon comes the number of a "
            "line of the file, from 1"
        ) from None
    if not isinstance(entry, dict) or entry.get("status") != DONE:
        raise UserError(f"{path}:{number} is not the record of a finished run")
    return result_of(entry, f"{path}:{number}")


def _table(differing: list[Figure]) -> str:
    rows = [["figure", "before", "now", "difference"]]
    rows += [
        [f.name, f"{f.before:.6g}", f"{f.after:.6g}", f"{f.after - f.before:+.3g}"]
        for f in differing
    ]
    return aligned(rows, 1)
