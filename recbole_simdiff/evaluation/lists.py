"""Rankings as text: TREC run files of a run, and lists that other programs made."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from recbole_simdiff import files
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.rankings import LISTS, RANKS
from recbole_simdiff.log import logger

QRELS = "qrels.trec"
TREC = ("user", "q0", "item", "rank", "score", "tag")  # columns of a TREC run file
_AS_TEXT: dict[str, Any] = {"dtype": str, "keep_default_na": False}


def write_trec(run_dir: Path, folder: Path) -> list[Path]:
    """Write a run's test rankings as TREC run files, which trec_eval, ranx and ir_measures read.

    ``kept.trec`` and ``removed.trec`` have a line ``user Q0 item rank score tag`` for each item,
    the score falling by 1 a rank; ``qrels.trec`` has ``user 0 item 1`` for each target. Further
    test rows of one user are ``user:2``, ``user:3``, ...

    Args:
        run_dir (Path): folder of a run with rankings.
        folder (Path): of the files.

    Returns:
        list: the files.

    Raises:
        UserError: if the run has no rankings, or an id has a space in it.
    """
    missing = [name for name in (RANKS, LISTS) if not (run_dir / name).is_file()]
    if missing:
        raise UserError(
            f"{run_dir / missing[0]} does not exist; write it with evaluate "
            f"--checkpoint={run_dir} --save_rankings=True"
        )
    ranks = pd.read_csv(run_dir / RANKS, **_AS_TEXT)
    lists = pd.read_csv(run_dir / LISTS, **_AS_TEXT).astype({"rank": int})
    for table in (ranks, lists):
        _refuse_spaces(table)
    number = ranks.groupby("user").cumcount() + 1
    qrels = pd.DataFrame({"user": _numbered(ranks["user"], number), "q0": 0, "item": ranks["item"]})
    tables = {QRELS: qrels.assign(relevance=1)}
    for name, part in lists.groupby("history", sort=False):
        # Each row's list begins with rank 1.
        number = (part["rank"] == 1).groupby(part["user"]).cumsum()
        best = part["rank"].max() + 1
        user = _numbered(part["user"], number)
        columns = {"user": user, "q0": "Q0", "item": part["item"], "rank": part["rank"]}
        columns |= {"score": best - part["rank"], "tag": run_dir.resolve().name}
        tables[f"{name}.trec"] = pd.DataFrame(columns)
    for name, table in tables.items():
        write = partial(table.to_csv, sep=" ", header=False, index=False, quoting=csv.QUOTE_NONE)
        files.write_atomically(folder / name, write)
    return [folder / name for name in tables]


def _refuse_spaces(table: pd.DataFrame) -> None:
    for column in ("user", "item"):
        wrong = table[column][table[column].str.contains(r"\s") | (table[column] == "")]
        if len(wrong):
            raise UserError(
                f"{column} {wrong.iloc[0]!r} has a space in it, which separates the columns of a "
                "TREC file; give the data set other ids"
            )


def _numbered(user: pd.Series, number: pd.Series) -> pd.Series:
    return user.where(number == 1, user + ":" + number.astype(str))


# ---------------------------------------------------------------------- foreign lists


class ListedItems(nn.Module):
    """Ranks for each user the items of a list, in its order, and nothing else.

    ``Evaluator`` scores it like a model, under both protocols.

    Args:
        items (LongTensor): each user's items, best first, 0 after the last one, [users, K].
        n_items (int): of the data set, padding included.
        user_field (str): column of users in a batch.
    """

    def __init__(self, items: Tensor, n_items: int, user_field: str) -> None:
        super().__init__()
        self.items, self.n_items, self.user_field = items, n_items, user_field

    def full_sort_predict(self, batch: Any) -> Tensor:
        """Scores of all items, -inf for those that are not listed: [B, N]."""
        listed = self.items[batch[self.user_field].cpu()]  # [B, K]
        falling = torch.arange(listed.shape[1], 0, -1.0).expand(listed.shape)
        scores = torch.full((len(listed), self.n_items), -torch.inf)
        scores.scatter_(1, listed, falling)
        scores[:, 0] = -torch.inf
        return scores


def read_lists(path: Path, dataset: FlatDataset) -> Tensor:
    """Each user's list of a file.

    Args:
        path (Path): CSV, or tab-separated (.tsv), with a header that has ``user``, ``item``, and
            ``rank`` (from 1) or ``score`` (greatest first; of equal ones the first line); or a
            TREC run file (.trec, .run). May be packed with gzip (.gz).
        dataset (FlatDataset): has the ids. Items that it lacks are left out.

    Returns:
        LongTensor: items of each user, best first, 0 after the last one, [users, K].

    Raises:
        UserError: if the file cannot be read, has an unknown user or no known item, or an item
            twice in a list.
    """
    table = _table(path)
    order = _order(path, table)
    user = pd.Index(dataset.user_ids).get_indexer(pd.Index(table["user"]))
    item = pd.Index(dataset.item_ids).get_indexer(pd.Index(table["item"]))
    if (user < 1).any():
        name = table["user"][user < 1].iloc[0]
        raise UserError(f"{path}: user {name!r} is not in the data set {dataset.dataset_name}")
    listed = pd.DataFrame({"user": user, "item": item, "order": order})[item > 0]
    if unknown := int((item < 1).sum()):
        logger.warning(
            f"{path}: {unknown:,} of {len(table):,} lines name items that are not in the data set; "
            "they are left out"
        )
    if listed.empty:
        raise UserError(
            f"{path}: none of its items is in the data set {dataset.dataset_name}; ids there are "
            f"such as {', '.join(dataset.item_ids[1:4])}"
        )
    if listed.duplicated(["user", "item"]).any():
        first = listed[listed.duplicated(["user", "item"])].iloc[0]
        raise UserError(
            f"{path}: user {dataset.user_ids[int(first['user'])]!r} has item "
            f"{dataset.item_ids[int(first['item'])]!r} twice"
        )
    listed = listed.sort_values(["user", "order"], kind="stable")
    place = listed.groupby("user").cumcount()
    items = torch.zeros(len(dataset.user_ids), int(place.max()) + 1, dtype=torch.long)
    columns = (torch.from_numpy(v.to_numpy().copy()) for v in (listed["user"], place))
    items[tuple(columns)] = torch.from_numpy(listed["item"].to_numpy().copy()).long()
    return items


def unseen_lengths(items: Tensor, dataset: FlatDataset, rows: Any) -> Tensor:
    """How many items of a row's list are left when those of its user's history are removed, [B].

    Args:
        items (LongTensor): each user's list, see ``read_lists``.
        dataset (FlatDataset): all interactions.
        rows (Interaction): test rows, at most one a user.
    """
    user, target = rows[dataset.uid_field], rows[dataset.iid_field].unsqueeze(1)
    listed, n_items = items[user], dataset.item_num
    if not dataset.list_fields:  # ready-made prefixes
        return (listed > 0).sum(1)
    pairs = dataset.flat[dataset.uid_field].long() * n_items + dataset.flat[dataset.iid_field]
    seen = torch.isin(user.unsqueeze(1) * n_items + listed, pairs) & (listed != target)
    return ((listed > 0) & ~seen).sum(1)


def _table(path: Path) -> pd.DataFrame:
    """The file's columns as text."""
    name = path.name.removesuffix(".gz")
    trec = name.endswith((".trec", ".run"))
    separator = r"\s+" if trec else "\t" if name.endswith(".tsv") else ","
    names = {"names": list(TREC)} if trec else {}
    try:
        table = pd.read_csv(path, sep=separator, **names, **_AS_TEXT)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read: {error}") from None
    missing = {"user", "item"} - set(table)
    if missing or not {"rank", "score"} & set(table):
        raise UserError(
            f"{path} has the columns {', '.join(table)}; it needs user, item, and rank or score"
        )
    if table.empty:
        raise UserError(f"{path} has no lines")
    return table


def _order(path: Path, table: pd.DataFrame) -> Any:
    """What each list is sorted by, rising."""
    key = "rank" if "rank" in table else "score"
    values = pd.to_numeric(table[key], errors="coerce").to_numpy(dtype=float)
    if not np.isfinite(values).all():
        number = int(np.flatnonzero(~np.isfinite(values))[0])
        raise UserError(f"{path}: {key} {table[key].iloc[number]!r} is not a number")
    return values if key == "rank" else -values
