"""Files of every user's test rank and top items."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_simdiff import files
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.evaluation.protocols import PROTOCOLS

RANKS, LISTS = "ranks.csv", "lists.csv.gz"


def save_rankings(
    rows: Mapping[Any, Tensor], dataset: FlatDataset, train: FlatDataset, folder: Path
) -> None:
    """Write the test rankings, in the ids of the data set.

    ``ranks.csv`` has a line for each test row: ``user``, ``item`` (the target), ``length`` (items
    of the input), ``train_count`` (training interactions of the target), ``rank_kept`` and
    ``rank_removed`` (rank of the target, from 1, by protocol). ``lists.csv.gz`` has the items
    ranked first: ``user``, ``history`` (kept or removed), ``rank``, ``item``; a list has fewer than
    max(topk) items where fewer can be recommended.

    Args:
        rows (Mapping): ``Evaluation.rows``.
        dataset (FlatDataset): all interactions, for the ids.
        train (FlatDataset): the training part.
        folder (Path): of the run.
    """
    values = {name: tensor.numpy() for name, tensor in rows.items()}
    items = np.array(dataset.item_ids, dtype=object)
    user = np.array(dataset.user_ids, dtype=object)[values["user"]]
    rows_alone = not train.list_fields  # ready-made rows: their targets are all there is to count
    trained = train.inter_feat[train.iid_field] if rows_alone else train.training_items()[0]
    counts = torch.bincount(trained, minlength=dataset.item_num).numpy()
    ranks = {"user": user, "item": items[values["item"]], "length": values["length"]}
    ranks |= {"train_count": counts[values["item"]]}
    lists = []
    for protocol in (p for p in PROTOCOLS if ("rank", p) in rows):
        name, first = protocol.removeprefix("history "), values["list", protocol]
        ranks[f"rank_{name}"] = values["rank", protocol]
        n, k = first.shape
        columns = {"user": user.repeat(k), "history": name}
        columns |= {"rank": np.tile(np.arange(1, k + 1), n), "item": items[first.reshape(-1)]}
        lists.append(pd.DataFrame(columns)[first.reshape(-1) > 0])
    for name, table in ((RANKS, pd.DataFrame(ranks)), (LISTS, pd.concat(lists))):
        packed = "gzip" if name == LISTS else None
        write = partial(table.to_csv, index=False, compression=packed)
        files.write_atomically(folder / name, write)
