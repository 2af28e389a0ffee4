"""Epochs that ``init_from`` saves after some days of new data, as a table.

    python -m tests.benchmarks.warm_start [--data_path=DIR] [--days=1,7] [--users=N]

DIR holds ml-100k/ml-100k.inter, whose times are dates; by default it is RecBole's example. A source
is trained to the end on all interactions but those of the last days. Then all interactions are
there: a training from zero, to its end, gives the score to reach, its best validation NDCG@10; a
second one begins with the source. Both splits are leave-one-out, so the source has trained on
nothing that is held out later. The encoder is small (see ``SETTINGS``), and all trainings have the
same settings and stop after five epochs without a better score. With --users, that many users are
drawn first.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import recbole

from recbole_simdiff import run
from recbole_simdiff.experiments.tables import grid
from recbole_simdiff.runs.result import RESULT

DATASET, DAY, METRIC = "ml-100k", 24 * 3600, "ndcg@10"
EXAMPLE = Path(recbole.__file__).parent / "dataset_example"
SETTINGS: dict[str, Any] = {
    "hidden_size": 32,
    "n_layers": 1,
    "learning_rate": 0.003,
    "train_batch_size": 64,
    "epochs": 60,
    "stopping_step": 5,
    "stopping_updates": 1,
}
HEAD = ("days", "new interactions", "training", "epochs", "best epoch", f"valid {METRIC}")
LAST_COLUMNS = ("epochs to the score from zero", "share", f"test {METRIC}")


def main() -> None:
    """Print three rows for each number of days."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default=str(EXAMPLE))
    parser.add_argument("--days", default="1,7")
    parser.add_argument("--model", default="SASRecCE")
    parser.add_argument("--users", type=int, help="all by default")
    parser.add_argument("--seed", type=int, default=2020)
    given = parser.parse_args()
    table = pd.read_csv(Path(given.data_path) / DATASET / f"{DATASET}.inter", sep="\t")
    if given.users:
        users = (
            table["user_id:token"].drop_duplicates().sample(given.users, random_state=given.seed)
        )
        table = table[table["user_id:token"].isin(users)]
    print(grid([[*HEAD, *LAST_COLUMNS]]), flush=True)
    with tempfile.TemporaryDirectory() as name:
        whole = trained(given, Path(name), table, "zero")
        for days in map(int, given.days.split(",")):
            time = table["timestamp:float"]
            older = table[time < time.max() - days * DAY]
            source = trained(given, Path(name), older, f"{days}-source")
            warm = trained(given, Path(name), table, f"{days}-warm", source["run_dir"])
            new = f"{len(table) - len(older):,}"
            for label, result in (("source", source), ("from zero", whole), ("warm", warm)):
                cells = [str(days), new, label, *figures(result, whole)]
                print(f"| {' | '.join(cells)} |", flush=True)


def trained(
    given: argparse.Namespace, folder: Path, table: pd.DataFrame, name: str, init_from: Any = None
) -> dict[str, Any]:
    """The result of a training on a table of interactions, with its log."""
    path = folder / "data" / name / f"{name}.inter"
    path.parent.mkdir(parents=True)
    table.to_csv(path, sep="\t", index=False)
    values = {"data_path": str(folder / "data"), "checkpoint_dir": str(folder / "saved")}
    values |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    values |= SETTINGS | {"seed": given.seed, "use_gpu": False, "show_progress": False}
    found = run(given.model, name, init_from=init_from, **values)
    content: dict[str, Any] = json.loads((Path(found.run_dir) / RESULT).read_text())
    return content


def figures(result: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Cells of a training: how long it was, how good, and when as good as the one from zero."""
    scores, wanted = (
        [entry["valid"][METRIC] for entry in one["log"] if "valid" in entry]
        for one in (result, whole)
    )
    reached = next((n for n, score in enumerate(scores, 1) if score >= max(wanted)), None)
    needed = wanted.index(max(wanted)) + 1
    share = "-" if reached is None else f"{reached / needed:.2f}"
    text = "never" if reached is None else str(reached)
    if result["statistics"] != whole["statistics"]:  # the source has another split
        text = share = "-"
    return [
        *(str(len(scores)), str(scores.index(max(scores)) + 1), f"{max(scores):.4f}"),
        *(text, share),
        f"{next(iter(result['test'].values()))[METRIC]:.4f}",
    ]


if __name__ == "__main__":
    main()
