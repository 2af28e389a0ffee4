"""Epochs that ``init_from`` saves after some days of new data, as a table.

    python -m tests.benchmarks.warm_start [--data_path=DIR] [--days=1,7] [--users=N]

DIR holds ml-100k/ml-100k.inter, whose times are dates; by default it is RecBole's example. A source
is trained to the end on all interactions but those of the last days. Then all interactions are
there: a training from zero, to its end, gives the score to reach, its best validation NDCG@10; a
second one begins with the source. Both splits are leave-one-out, so the source has trained on
nothing that is held out later. The encoder is small (see ``SETTINGS``), and all trainings have the
same settings and stop after ten epochs without a better score; only the warm one may have another
learning rate. With --users, that many users are drawn first.

A score of 943 users moves by about 5 % from one epoch to the next, and the best one of a training
is the luckiest. So there is a column for NEAR of that score, too, and one for the first epoch.
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
    "stopping_step": 10,
    "stopping_updates": 1,
}
NEAR = 0.95
HEAD = ("days", "new", "training", "epochs", "best epoch", f"valid {METRIC}", "first epoch's")
LAST_COLUMNS = (
    "epochs to the score from zero",
    "share",
    f"epochs to {NEAR:.0%} of it",
    "share",
    f"test {METRIC}",
)


def main() -> None:
    """Print three rows for each number of days."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default=str(EXAMPLE))
    parser.add_argument("--days", default="1,7")
    parser.add_argument("--model", default="SASRecCE")
    parser.add_argument("--users", type=int, help="all by default")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--warm_learning_rate", type=float, default=SETTINGS["learning_rate"])
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
            start = {"init_from": source["run_dir"], "learning_rate": given.warm_learning_rate}
            warm = trained(given, Path(name), table, f"{days}-warm", **start)
            new = f"{len(table) - len(older):,}"
            for label, result in (("source", source), ("from zero", whole), ("warm", warm)):
                cells = [str(days), new, label, *figures(result, whole)]
                print(f"| {' | '.join(cells)} |", flush=True)


def trained(
    given: argparse.Namespace, folder: Path, table: pd.DataFrame, name: str, **start: Any
) -> dict[str, Any]:
    """The result of a training on a table of interactions, with its log."""
    path = folder / "data" / name / f"{name}.inter"
    path.parent.mkdir(parents=True)
    table.to_csv(path, sep="\t", index=False)
    values: dict[str, Any] = {
        "data_path": str(folder / "data"),
        "checkpoint_dir": str(folder / "saved"),
    }
    values |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    values |= SETTINGS | {"seed": given.seed, "use_gpu": False, "show_progress": False}
    found = run(given.model, name, **(values | start))
    content: dict[str, Any] = json.loads((Path(found.run_dir) / RESULT).read_text())
    return content


def figures(result: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Cells of a training: how long it was, how good, and when as good as the one from zero."""
    scores, wanted = (
        [entry["valid"][METRIC] for entry in one["log"] if "valid" in entry]
        for one in (result, whole)
    )
    cells = [str(len(scores)), str(scores.index(max(scores)) + 1)]
    cells += [f"{max(scores):.4f}", f"{scores[0]:.4f}"]
    for part in (1.0, NEAR):
        goal = part * max(wanted)
        reached, needed = (
            next((n for n, score in enumerate(one, 1) if score >= goal), None)
            for one in (scores, wanted)
        )
        if result["statistics"] != whole["statistics"]:  # the source has another split
            cells += ["-", "-"]
        elif reached is None or needed is None:
            cells += ["never", "-"]
        else:
            cells += [str(reached), f"{reached / needed:.2f}"]
    return [*cells, f"{next(iter(result['test'].values()))[METRIC]:.4f}"]


if __name__ == "__main__":
    main()
