"""What the parts share: models on a data set, the time there is, and where results go."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recbole_simdiff.config.config import Config
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.training.trainer import PlanTrainer
from tests.digest import write_data

Row = dict[str, Any]

FITTED = {"EASE", "ItemKNN", "Pop"}  # computed, without steps
SMALL = {
    "train_batch_size": 16,
    "MAX_ITEM_LIST_LENGTH": 8,
    "hidden_size": 16,
    "inner_size": 16,
    "k_noise": 5,
    "topk": [5],
    "valid_metric": "NDCG@5",
    "epochs": 2,
}


class OutOfTime(Exception):
    """The time of a part is used up."""


@dataclass
class Session:
    """One call of the command.

    Attributes:
        device (str): ``cuda`` or ``cpu``.
        data_path (str): folder of data sets.
        dataset (str): the one that is timed; the small one in the reduced form.
        output (Path): where rows, table and files go.
        reduced (bool): tiny data and few steps, to see that everything runs.
        seconds (float): of all parts together.
    """

    device: str
    data_path: str
    dataset: str
    output: Path
    reduced: bool
    seconds: float
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    ready: dict[str, Any] = field(default_factory=dict)  # models that were timed, by name

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        if not (self.output / "data" / "toy").exists():
            write_data(self.output / "data" / "toy")
        if self.reduced:
            self.data_path, self.dataset = str(self.output / "data"), "toy"

    # ------------------------------------------------------------------ time and results

    def left(self) -> float:
        """Seconds left to the present part."""
        return self.deadline - time.monotonic()

    def run(self, name: str, part: Callable[["Session"], Iterator[Row]], seconds: float) -> None:
        """Run a part, and keep its rows as they come; an error is a row, too.

        Args:
            name (str): of the part.
            part (Callable): yields rows; a row with ``ok: False`` is a failure.
            seconds (float): after which the part must begin nothing more.
        """
        began = time.monotonic()
        self.deadline = min(began + seconds, self.started + self.seconds)
        try:
            for row in part(self):
                self.keep({"part": name, **row})
        except OutOfTime as error:
            self.keep({"part": name, "left out": str(error)})
        except Exception as error:  # of whatever kind: the other parts are to run
            text = " ".join(str(error).split())[:500]
            self.keep({"part": name, "error": f"{type(error).__name__}: {text}", "ok": False})
        self.keep({"part": name, "took": round(time.monotonic() - began, 1)})

    def keep(self, row: Row) -> None:
        """Write a row to ``results.jsonl`` and the table of all rows to ``results.md``."""
        self.rows.append(row)
        with (self.output / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (self.output / "results.md").write_text(table(self.rows))
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)

    def each(self, names: list[str]) -> Iterator[str]:
        """The names one by one, as long as there is time.

        Raises:
            OutOfTime: naming those that are left.
        """
        for number, name in enumerate(names):
            if self.left() <= 0:
                raise OutOfTime(", ".join(names[number:]))
            yield name

    # ------------------------------------------------------------------ models

    def trained_models(self) -> list[str]:
        """Models of this package that are trained step by step, the most important first."""
        first = ["SimDiffRec", "SASRecCE", "CaDiRec", "DreamRec"]
        others = sorted(plugin_models().keys() - FITTED - {*first, "DiffCLRec"})
        return first[:1] if self.reduced else first + others

    def config(self, model: str, device: str | None = None, **values: Any) -> Config:
        """A configuration on the data set that is timed."""
        small = SMALL if self.reduced else {}
        fixed = {"data_path": self.data_path, "show_progress": False}
        fixed |= {"checkpoint_dir": str(self.output / "runs")}
        fixed["use_gpu"] = (device or self.device) == "cuda"
        known = Config(model, self.dataset).final_config_dict
        small = {key: value for key, value in small.items() if key in known}
        return Config(model, self.dataset, overrides={**small, **fixed, **values})

    def toy(self, model: str, device: str | None = None, **values: Any) -> Config:
        """A configuration of a small model on small data, where a CPU is quick, too."""
        before = self.reduced, self.data_path, self.dataset
        self.reduced, self.data_path, self.dataset = True, str(self.output / "data"), "toy"
        try:
            return self.config(model, device, **values)
        finally:
            self.reduced, self.data_path, self.dataset = before

    def trainer(self, config: Config, folder: str) -> tuple[PlanTrainer, Any, Any]:
        """A trainer of a fresh model, its training data and its validation data."""
        _, train, valid, _, model = build_run(config)
        return PlanTrainer(config, model, self.output / "runs" / folder), train, valid

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """The rows as Markdown, a table a part."""
    text = ""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part]
        columns = list(dict.fromkeys(key for row in own if "took" not in row for key in row))
        text += f"\n## {part}\n\n"
        text += "| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|\n"
        for row in own:
            if "took" in row:
                text += f"\n{row['took']} s\n"
            else:
                cells = (str(row.get(column, "")).replace("|", "/") for column in columns)
                text += "| " + " | ".join(cells) + " |\n"
    return text.lstrip()
