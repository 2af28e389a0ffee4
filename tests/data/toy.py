"""Data and readers that the tests of data sets share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import SequentialDataset

from recbole_simdiff.config.config import Config
from recbole_simdiff.data.recbole_fixes import RecBoleFixes
from tests.conftest import SMALL

# Far longer than the maximum length of 4; "a" and "b" repeat items, "c" ends on a full window.
LONG = {
    "a": [f"i{k}" for k in range(20)] + ["i3", "i3", "i0"],
    "b": ["i5", "i5", "i5", "i7", "i5", "i7", "i5", "i8", "i5", "i9", "i5"],
    "c": [f"i{k}" for k in range(11)],
    "d": ["i1", "i2", "i3"],
    "e": ["i4", "i6"],
}

HEADER = "user_id:token,item_id:token,timestamp:float"

LOAD = {"inter": ["user_id", "item_id", "timestamp"]}


class RecBoleRows(RecBoleFixes, SequentialDataset):
    """RecBole's own rows; only the faults that stop it on today's pandas are mended."""


class RecBoleRowsInExactOrder(RecBoleRows):
    """The same, with the interactions in exact time order before RecBole rounds the times."""

    def _change_feat_format(self) -> None:
        self.inter_feat = self.inter_feat.sort_values(
            [self.uid_field, self.time_field], kind="stable", ignore_index=True
        )
        super()._change_feat_format()


def write_atomic(path: Path, header: str, rows: list[str]) -> Path:
    """Write an atomic file; ``header`` and ``rows`` use a comma for the tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]).replace(",", "\t") + "\n")
    return path


def all_rows(part: Any) -> Any:
    return part[torch.arange(len(part))]


def readable(part: Any) -> list[tuple[str, list[str], str]]:
    """(user, history, target) of every row in raw ids, in a fixed order."""
    rows, users, items = all_rows(part), part.field2id_token["user_id"], part.field2id_token
    found = []
    for user, seq, length, target in zip(
        rows["user_id"], rows["item_id_list"], rows["item_length"], rows["item_id"], strict=True
    ):
        names = [str(items["item_id"][i]) for i in seq[:length]]
        found.append((str(users[user]), names, str(items["item_id"][target])))
    return sorted(found)


def raw(dataset: Any, field: str, ids: Any) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][np.asarray(ids, int)]]


def augmented(data_path: Path, backbone: str, **changes: Any) -> Config:
    """DiffuASR's configuration with that backbone, on the data set ``long``."""
    values = SMALL | {"data_path": str(data_path), "MAX_ITEM_LIST_LENGTH": 12}
    known = Config(backbone, "long").final_config_dict
    values = {k: v for k, v in values.items() if k in known}
    values |= {"backbone": backbone, "augmenter": "random"} | changes
    return Config("DiffuASR", "long", overrides=values)
