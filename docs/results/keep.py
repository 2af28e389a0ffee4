"""Keep the records of finished runs of one row, without weights and paths, for the tables.

    python docs/results/keep.py saved/<run> [saved/<run> ...] NAME "label of its row" "arguments"

writes ``runs/NAME.json`` of the run with seed 2020, and ``runs/NAME-SEED.json`` of another:
metrics, settings, versions and the log of every epoch. Runs of one row differ in nothing but the
seed. The arguments are those of the command without data set and seed. ``rows.txt`` says where the
row stands and which encoder it is compared with.

The comparison needs every user's test rank. A run that was trained with ``--save_rankings=True``
has them; a finished one gets them from ``evaluate --checkpoint=saved/<run> --save_rankings=True``.
They are kept as ``runs/NAME.npz``.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from records import FIRST_SEED, RUNS, read_ranks, save_ranks

from recbole_simdiff import files
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.experiments.results import metric_of_rank

PATHS = ("data_path", "checkpoint_dir", "augmentation_cache", "baseline_checkpoint", "item_table")


def main(runs: list[str], name: str, row: str, arguments: str) -> None:
    """Write the records.

    Raises:
        ValueError: if two runs have the same seed, runs of the row have another model, data set or
            settings, a record would name a path of the machine, or stored ranks are not those of
            the result. Nothing is written then.
    """
    records = {}
    for run in runs:
        one = record(json.loads(Path(run, "result.json").read_text()), row, arguments)
        seed = one["config"]["values"]["seed"]
        path = RUNS / f"{name if seed == FIRST_SEED else f'{name}-{seed}'}.json"
        if path in records:
            raise ValueError(f"{records[path][0]} and {run} both have seed {seed}; give one")
        records[path] = run, one
    others = (path for path in sorted(RUNS.glob("*.json")) if path not in records)
    of_row = [kept for path in others if (kept := json.loads(path.read_text()))["row"] == row]
    for _, one in records.values():
        check(one, of_row)
        of_row.append(one)
    ranks_of = {path: read_ranks(Path(run)) for path, (run, _) in records.items()}
    for path, (_, one) in records.items():
        if ranks := ranks_of[path]:
            check_ranks(ranks, one)
    for path, (run, one) in records.items():
        if ranks := ranks_of[path]:
            save_ranks(ranks, path.with_suffix(".npz"))
        else:  # those of a run that was kept before are not this one's
            path.with_suffix(".npz").unlink(missing_ok=True)
        files.write_text(path, json.dumps(one, indent=1) + "\n")
        print(path, "with ranks" if ranks else f"(no ranks.csv in {run})")


def record(result: dict[str, Any], row: str, arguments: str) -> dict[str, Any]:
    """What is kept of a ``result.json``.

    Args:
        result (dict): its content.
        row (str): label in tables.
        arguments (str): what the run was started with.
    """
    values = result["config"]["values"]
    reached = result["epochs"] >= values["epochs"]
    kept = {"row": row, "arguments": arguments, "ended": "epochs" if reached else "patience"}
    left_out = {"run_dir", "config", "augmentation"}
    kept |= {key: value for key, value in result.items() if key not in left_out}
    if made := result.get("record"):
        options = tuple(f"--{key}=" for key in PATHS)
        command = [word for word in made["command"] if not word.startswith(options)]
        kept["record"] = made | {"command": command}
    settings = {key: value for key, value in values.items() if key not in PATHS}
    return kept | {"config": {**result["config"], "values": settings}}


def check(one: Mapping[str, Any], of_row: list[Mapping[str, Any]]) -> None:
    """Refuse a record that names a path, or has another model or other settings than the row.

    Raises:
        ValueError: saying which.
    """
    for text in texts(one):
        if text.startswith("/") or "=/" in text:
            raise ValueError(f"the record would name a path of this machine: {text}")
    for other in of_row:
        ours, theirs = one["config"]["values"], other["config"]["values"]
        # A key that only one of them has is of another version.
        common = (ours.keys() & theirs.keys()) - {"seed", *NOT_IN_RESULT}
        differ = [key for key in ("model", "dataset") if one["config"][key] != other["config"][key]]
        differ += sorted(key for key in common if ours[key] != theirs[key])
        if differ:
            raise ValueError(f"runs of {one['row']!r} differ in {', '.join(differ)}")


def check_ranks(ranks: Mapping[str, NDArray[Any]], one: Mapping[str, Any]) -> None:
    """Refuse ranks that give other metrics than the result has.

    Raises:
        ValueError: naming the metric.
    """
    for protocol in PROTOCOLS:
        ours = metric_of_rank(ranks[protocol.removeprefix("history ")], "ndcg@10").mean()
        if not np.isclose(ours, one["test"][protocol]["ndcg@10"], rtol=0, atol=1e-6):
            raise ValueError(
                f"by the stored ranks NDCG@10, {protocol}, is {ours:.6f}, by the result "
                f"{one['test'][protocol]['ndcg@10']:.6f}; run evaluate --save_rankings=True again"
            )


def texts(value: Any) -> Iterator[str]:
    """Every text within dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    *given, last_name, last_row, last_arguments = sys.argv[1:]
    try:
        main(given, last_name, last_row, last_arguments)
    except ValueError as error:
        sys.exit(str(error))
