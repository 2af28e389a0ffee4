"""Data sets and loaders: RecBole's split and evaluation over flat arrays, and our training batches.

RecBole writes one padded row per prefix and per loaded column. Here the
interactions stay one flat array, sorted by user and exact time; a row is a start and a
length in it, and padded rows are built for one batch at a time. Row for row they equal RecBole's.
"""

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import recbole.data.dataset as recbole_datasets
import torch
import yaml
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType
from torch import Tensor

from recbole_simdiff import files
from recbole_simdiff.data.recbole_fixes import HostFixes, _obstacle
from recbole_simdiff.data.statistics import PrefixStatistics, Statistics
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import needed_data_set
from recbole_simdiff.modules.batch import (
    HISTORY_START,
    PSEUDO_LENGTH,
    ROW_START,
    TARGET,
)


class SequenceRows:
    """A column of padded sequences that exists row by row only: ``rows[index]`` builds them."""

    def __init__(self, dataset: "FlatDataset", field: str) -> None:
        self.dataset, self.field = dataset, field

    def __getitem__(self, index: Any) -> Tensor:
        if np.ndim(index) == 0 and not isinstance(index, slice):
            return self[[int(index)]][0]
        return self.dataset.padded(self.field, self.dataset.inter_feat[index])

    def __len__(self) -> int:
        return len(self.dataset)


class FlatInteraction(Interaction):
    """An ``Interaction`` whose sequence columns are ``SequenceRows``."""

    def __init__(self, columns: dict[str, Any], dataset: "FlatDataset") -> None:
        super().__init__(columns)
        self.owner = dataset

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str) and index in self.owner.list_fields:
            return SequenceRows(self.owner, index)
        return super().__getitem__(index)


class FlatDataset(HostFixes, SequentialDataset):
    """RecBole's ``SequentialDataset`` over one flat array per column.

    After ``build``, the training part holds the rows that ``train_sampling`` asks for:

        prefix_last, prefix_all   every prefix of a user's training sequence
        user_all                  the newest MAX_ITEM_LIST_LENGTH training targets of a user, then
                                  the ones before them, ...: each target in exactly one window, but
                                  for those that ``older_windows`` leaves out

    Attributes:
        flat (dict): column -> values of all interactions, sorted by user and exact time.
        list_fields (dict): name of a sequence column -> its source column.
        pseudo (LongTensor | None): invented items of each user, oldest first, 0 for none,
            [users, M]; rows have some of them in front, see ``prepend``.
        targets_per_batch, tokens_per_batch (float): expected training targets, and input tokens, of
            a full batch.
    """

    list_fields: dict[str, str]
    pseudo: Tensor | None = None
    targets_per_batch: float
    tokens_per_batch: float

    def __init__(self, config: Any) -> None:
        self.list_fields = {}  # filled by ``build``
        super().__init__(config)

    def _change_feat_format(self) -> None:
        """Sort by user and float64 time before RecBole rounds times to float32.

        Symptom: Unix seconds in float32 are 64-128 s apart, so close events swap places and with
        them validation and test targets. Later sorts of RecBole are stable.
        """
        if self.benchmark_filename_list is None:
            self._check_time_field()
            self.inter_feat = self.inter_feat.sort_values(
                [self.uid_field, self.time_field], kind="stable", ignore_index=True
            )
        super()._change_feat_format()

    def _check_time_field(self) -> None:
        if self.time_field not in self.inter_feat:
            raise UserError(
                f"the time column {self.time_field!r} is not loaded; sequential data need it. Name "
                "it with TIME_FIELD and add it to load_col"
            )
        declared = self.field2type[self.time_field]
        if declared != FeatureType.FLOAT:
            raise UserError(
                f"the time column {self.time_field!r} is declared {declared.value}; it must be "
                "float for events to be put in order of time"
            )

    def _benchmark_presets(self) -> None:
        """Newest items, padded, and lengths of pre-split sequences.

        Symptom: ``agg(len)`` fails on pandas 3; Caser, DIN, FOSSIL, HGN, RepeatNet and SINE fail
        where no history has MAX_ITEM_LIST_LENGTH items.

        Raises:
            UserError: if there is no column of histories.
        """
        for field in self.inter_feat:
            if field + self.config["LIST_SUFFIX"] in self.inter_feat:
                setattr(self, f"{field}_list_field", field + self.config["LIST_SUFFIX"])
        length = self.item_list_length_field
        self._check_new_columns(length)
        history = self.iid_field + self.config["LIST_SUFFIX"]
        declared = self.field2type.get(history)
        if declared != FeatureType.TOKEN_SEQ:
            found = f"is declared {declared.value}" if declared else "is not loaded"
            raise UserError(
                f"benchmark_filename={self.benchmark_filename_list!r}: the column of histories, "
                f"{history}:token_seq, {found}; ITEM_ID_FIELD and LIST_SUFFIX make its name, and "
                "load_col loads it",
                keys=("benchmark_filename",),
            )
        self._leave_out_prefixes(history)
        self.set_field_property(
            length, FeatureType.TOKEN, recbole_datasets.dataset.FeatureSource.INTERACTION, 1
        )
        # RecBole applies no limit here, and models fail on rows beyond their last position.
        limit = self.max_item_list_len
        newest = [cell[-limit:] for cell in self.inter_feat[history]]
        padded = [np.pad(cell, (0, limit - len(cell))) for cell in newest]
        self.inter_feat[history] = pd.Series(padded, index=self.inter_feat.index, dtype=object)
        self.field2seqlen[history] = limit
        self.inter_feat[length] = [len(cell) for cell in newest]

    def _leave_out_prefixes(self, history: str) -> None:
        """Leave out ready-made prefixes without a user, a target or a history.

        Symptom: RecBole trains on padding as a target, and fails on an empty history.
        """
        feat = self.inter_feat
        some = np.array([len(cell) > 0 for cell in feat[history]], bool)
        kept = some & (feat[self.uid_field] > 0).to_numpy() & (feat[self.iid_field] > 0).to_numpy()
        if kept.all():
            return
        self.logger.warning(
            f"{self.dataset_name}: {(~kept).sum():,} of {len(kept):,} ready-made prefixes have no "
            f"{self.uid_field}, no {self.iid_field} or no {history} and are left out"
        )
        parts = np.split(kept, np.cumsum(self.file_size_list)[:-1])
        self.file_size_list = [int(part.sum()) for part in parts]
        self.inter_feat = feat[kept].reset_index(drop=True)

    def _check_new_columns(self, *made: str) -> None:
        """Refuse to write sequences and their lengths over columns of the file."""
        own = {self.uid_field, self.iid_field, *self.inter_feat}
        if taken := own & {*made, self.config["NEG_PREFIX"] + self.iid_field}:
            keys = ("ITEM_LIST_LENGTH_FIELD", "LIST_SUFFIX", "NEG_PREFIX")
            named = ", ".join(f"{key}={self.config[key]!r}" for key in keys)
            raise UserError(
                f"the column {taken.pop()!r} would be written over: {named} must give names that "
                f"the columns {', '.join(own)} do not have"
            )

    def data_augmentation(self) -> None:
        """One row per interaction but the first of a user, without writing the sequences out."""
        columns = self.inter_feat.interaction
        suffix = self.config["LIST_SUFFIX"]
        lists = [field + suffix for field in columns if field != self.uid_field]
        self._check_new_columns(self.item_list_length_field, *lists)
        self._aug_presets()
        user = columns[self.uid_field]
        place = torch.arange(len(user))
        first = torch.ones(len(user), dtype=torch.bool)
        first[1:] = user[1:] != user[:-1]
        begin = torch.where(first, place, 0).cummax(0).values
        target = place[~first]
        start = torch.maximum(begin[target], target - self.max_item_list_len)

        self.flat = dict(columns)
        self.list_fields = {
            getattr(self, f"{field}_list_field"): field
            for field in columns
            if field != self.uid_field
        }
        rows = {field: values[target] for field, values in columns.items()}
        rows[self.item_list_length_field] = target - start
        rows |= {HISTORY_START: begin[target], ROW_START: start, TARGET: target}
        self.inter_feat = FlatInteraction(rows, self)

    def copy(self, new_inter_feat: Interaction) -> "FlatDataset":
        """This data set with other rows (RecBole's split calls it once per part)."""
        part = super().copy(new_inter_feat)
        if self.list_fields:
            part.inter_feat = FlatInteraction(new_inter_feat.interaction, part)
        return part

    def _rows(self, chosen: Tensor) -> Interaction:
        """Some of the rows, sequence columns included: a mask over them, [n]."""
        rows = self.inter_feat[chosen]
        return FlatInteraction(rows.interaction, self) if self.list_fields else rows

    def build(self) -> list["FlatDataset"]:
        """RecBole's split, then the training rows that ``train_sampling`` asks for."""
        train, valid, test = super().build()
        rows = train.inter_feat
        if len(rows) == 0:
            raise UserError(
                f"dataset={self.dataset_name!r} has no training rows after filtering and "
                f"splitting: {self.statistics}",
                keys=("dataset",),
            )
        if self.config["train_fraction"] < 1:
            train.inter_feat = rows = train._rows(self._drawn_users()[rows[self.uid_field]])
        train.train_items = rows[self.iid_field].clone()
        style = self.config["train_sampling"]
        if style == "user_all":
            if not self.list_fields:
                raise UserError(
                    "train_sampling=user_all needs one interaction a line; benchmark_filename "
                    "gives ready-made prefixes, which train_sampling=prefix_last can use",
                    keys=("train_sampling",),
                )
            train.inter_feat = FlatInteraction(train._windows(), train)
        train._count_per_batch()
        return [train, valid, test]

    def _drawn_users(self) -> Tensor:
        """Whether a user's rows are trained on, [users]; a smaller share is part of a larger."""
        generator = torch.Generator().manual_seed(self.config["seed"])
        order = torch.randperm(self.user_num - 1, generator=generator) + 1
        drawn = torch.zeros(self.user_num, dtype=torch.bool)
        drawn[order[: math.ceil(self.config["train_fraction"] * len(order))]] = True
        return drawn

    def _count_per_batch(self) -> None:
        rows = self.inter_feat
        tokens = rows[self.item_list_length_field].double()
        targets = tokens - rows[PSEUDO_LENGTH] if PSEUDO_LENGTH in rows.interaction else tokens
        batch = min(self.config["train_batch_size"], len(rows))
        last_only = self.config["train_sampling"] == "prefix_last"
        self.tokens_per_batch = batch * tokens.mean().item()
        self.targets_per_batch = batch if last_only else batch * targets.mean().item()

    def training_items(self) -> tuple[Tensor, Tensor]:
        """Items of the training part of each user, in order of time; nothing later is read.

        Returns:
            tuple: items [n], and where each user's end, [users]; user 0 (padding) has none.
        """
        rows = self.inter_feat
        begin, newest = torch.zeros(2, self.user_num, dtype=torch.long)
        user = rows[self.uid_field]
        begin[user] = rows[HISTORY_START]
        newest.scatter_reduce_(0, user, rows[TARGET] + 1, "amax")
        count = (newest - begin).clamp(min=0)
        ends = count.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(self.user_num), count)
        place = torch.arange(len(owner)) - (ends - count)[owner]
        return self.flat[self.iid_field][begin[owner] + place], ends

    def prepend(self, pseudo: Tensor, keep_rows: bool) -> None:
        """Put invented items in front of the rows that begin with a user's first item.

        A row of length l takes the min(M, L - l) invented items nearest to the real ones; rows that
        fill the maximum length L stay as they are. Targets, users and histories do not change.

        Args:
            pseudo (LongTensor): [users, M], 0 for users without.
            keep_rows (bool): add the longer rows to the old ones instead of replacing them.
        """
        old = dict(self.inter_feat.interaction)
        length = old[self.item_list_length_field]
        whole = (old[ROW_START] == old[HISTORY_START]) & (pseudo[old[self.uid_field], -1] > 0)
        k = torch.where(whole, (self.max_item_list_len - length).clamp(max=pseudo.shape[1]), 0)
        new = old | {PSEUDO_LENGTH: k, self.item_list_length_field: length + k}
        if keep_rows:
            old[PSEUDO_LENGTH] = torch.zeros_like(k)
            new = {field: torch.cat([old[field], new[field][k > 0]]) for field in new}
        self.pseudo = pseudo
        self.inter_feat = FlatInteraction(new, self)
        if hasattr(self, "targets_per_batch"):
            self._count_per_batch()

    def _windows(self) -> dict[str, Tensor]:
        """Rows that cover each training target of each user once, newest window first.

        ``older_windows`` may leave out those before the newest.
        """
        target = self.inter_feat[TARGET].sort().values
        begin, n_targets = torch.unique_consecutive(
            self.inter_feat[HISTORY_START].sort().values, return_counts=True
        )
        newest = begin + n_targets  # targets of a user are begin + 1, ..., begin + n_targets
        if not torch.equal(target[n_targets.cumsum(0) - 1], newest):
            raise UserError(
                "train_sampling=user_all needs every user's training part to be the beginning of "
                "the history; this eval_args split is not. Use train_sampling=prefix_last",
                keys=("train_sampling",),
            )
        size = self.max_item_list_len
        n_windows = (n_targets + size - 1) // size
        user = torch.repeat_interleave(torch.arange(len(begin)), n_windows)
        number = torch.arange(len(user)) - (n_windows.cumsum(0) - n_windows)[user]
        end = newest[user] - number * size
        start = torch.maximum(begin[user], end - size)
        least = self.config["older_windows"]
        kept = (number == 0) | (end - start >= least if least else number < 0)
        user, start, end = user[kept], start[kept], end[kept]
        rows = {field: values[end] for field, values in self.flat.items()}
        rows[self.item_list_length_field] = end - start
        return rows | {HISTORY_START: begin[user], ROW_START: start, TARGET: end}

    def padded(self, list_field: str, rows: Interaction) -> Tensor:
        """A sequence column of some rows, right-padded with 0, [rows, MAX_ITEM_LIST_LENGTH]."""
        field = self.list_fields[list_field]
        start, length = rows[ROW_START], rows[self.item_list_length_field]
        if self.pseudo is None:
            return gather_rows(self.flat[field], start, length, self.max_item_list_len)
        pseudo = self.pseudo[rows[self.uid_field]] if field == self.iid_field else None
        k = rows[PSEUDO_LENGTH]
        return gather_rows(self.flat[field], start, length, self.max_item_list_len, k, pseudo)

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        """Rows with their padded sequences, as RecBole's loaders expect them."""
        if isinstance(index, list | np.ndarray):
            index = torch.as_tensor(index)
        rows = self.inter_feat[index]
        sequences = {field: self.padded(field, rows) for field in self.list_fields}
        rows = Interaction({**rows.interaction, **sequences})
        return self.join(rows) if join else rows

    def history(self, rows: Interaction) -> tuple[Tensor, Tensor]:
        """(row, item) pairs of all earlier interactions of each row, without the row's target.

        Args:
            rows (Interaction): rows of this data set.

        Returns:
            tuple: row numbers and item ids, both [pairs].
        """
        begin, target = rows[HISTORY_START], rows[TARGET]
        count = target - begin
        row = torch.repeat_interleave(torch.arange(len(count)), count)
        offset = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        item = self.flat[self.iid_field][begin[row] + offset]
        keep = item != rows[self.iid_field][row]
        return row[keep], item[keep]

    def has_all_items(self, with_target: bool) -> str | None:
        """The user of a row that holds every item there is; None if no row does.

        Args:
            with_target (bool): whether the target of a row is one of its items.
        """
        if self.max_item_list_len + with_target < self.item_num - 1:
            return None
        rows, sequences = (
            self.inter_feat,
            self.inter_feat[self.iid_field + self.config["LIST_SUFFIX"]],
        )
        for part in torch.arange(len(rows)).split(10_000):
            held = torch.zeros(len(part), self.item_num, dtype=torch.bool)
            held.scatter_(1, sequences[part], True)
            if with_target:
                held.scatter_(1, rows[self.iid_field][part].unsqueeze(1), True)
            full = held[:, 1:].all(1)
            if full.any():
                user = rows[self.uid_field][part][full][0]
                return str(self.id2token(self.uid_field, user))
        return None

    def counter(self, field: str) -> Counter[Any]:
        """Counts of a column; of items, over all training targets (popularity metrics)."""
        if field == self.iid_field and hasattr(self, "train_items"):
            return Counter(self.train_items.numpy())
        return super().counter(field)

    @property
    def statistics(self) -> Statistics:
        """Users, items and actions after filtering."""
        users, items = self.user_num - 1, self.item_num - 1
        if self.benchmark_filename_list is not None:
            return PrefixStatistics(users, items, sum(self.file_size_list))
        columns = self.flat if self.list_fields else self.inter_feat
        user, item = (np.asarray(columns[name]) for name in (self.uid_field, self.iid_field))
        pairs = len(np.unique(user.astype(np.int64) * self.item_num + item))
        return Statistics(users, items, len(user), pairs)

    def item_titles(self) -> dict[str, str]:
        """Raw item id -> title from ``item_title_field`` of the .item file; empty if not asked for.

        Raises:
            UserError: if the file or the column is missing.
        """
        field = self.config["item_title_field"]
        if field is None:
            return {}
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if obstacle := _obstacle(path):
            raise UserError(
                f"item_title_field={field!r} needs {path}, which {obstacle}",
                keys=("item_title_field",),
            )
        headers = self._header(str(path))
        names = {header.partition(":")[0]: header for header in headers}
        if field not in names or self.iid_field not in names:
            raise UserError(f"{path} has no column {field!r}; it has {', '.join(names)}")
        wanted = [names[self.iid_field], names[field]]
        frame = self._read(str(path), headers, dict.fromkeys(wanted, str)).fillna("")
        known = self.field2token_id[self.iid_field]
        titles = zip(*(frame[header] for header in wanted), strict=True)
        return {item: title for item, title in titles if item in known}


def gather_rows(
    values: Tensor,
    start: Tensor,
    length: Tensor,
    width: int,
    n_pseudo: Tensor | None = None,
    pseudo: Tensor | None = None,
) -> Tensor:
    """Rows of a flat column, right-padded with 0.

    Args:
        values (Tensor): the column, [n, ...].
        start (LongTensor): where each row's real values begin, [rows].
        length (LongTensor): of each row, invented items included, [rows].
        width (int): columns of the result.
        n_pseudo (LongTensor | None): invented items in front of each row, [rows].
        pseudo (LongTensor | None): they themselves, of which each row takes the last ones,
            [rows, M]; without it (columns other than items) the first real value is repeated.

    Returns:
        Tensor: [rows, width, ...].
    """
    place = torch.arange(width, device=start.device)
    inside = place < length.unsqueeze(1)
    offset = place if n_pseudo is None else (place - n_pseudo.unsqueeze(1)).clamp(min=0)
    picked = values[torch.where(inside, start.unsqueeze(1) + offset, 0)]
    if n_pseudo is not None and pseudo is not None:
        size = pseudo.shape[1]
        column = (size - n_pseudo.unsqueeze(1) + place).clamp(max=size - 1)
        picked = torch.where(place < n_pseudo.unsqueeze(1), pseudo.gather(1, column), picked)
    return picked.masked_fill(~inside.view(*inside.shape, *[1] * (picked.dim() - 2)), 0)


def create_dataset(config: Any) -> FlatDataset:
    """The data set of a configuration, built from its files.

    Raises:
        UserError: if a file or column is missing, or the model is not sequential.
    """
    special = needed_data_set(config["model"])
    if special is not None:
        raise UserError(
            f"model={config['model']} needs RecBole's {special}, which is not supported",
            keys=("model",),
        )
    try:
        return FlatDataset(config)
    except UserError:
        raise
    except (ValueError, KeyError, yaml.YAMLError) as error:
        place = os.path.join(config["data_path"], f"{config['dataset']}.inter")
        raise UserError(
            f"dataset={config['dataset']!r} ({place}): {error}", keys=("dataset",)
        ) from error


def item_ids(dataset: FlatDataset) -> list[str]:
    """Raw item ids by number; number 0 is padding."""
    return [str(token) for token in dataset.field2id_token[dataset.iid_field]]


def user_ids(dataset: FlatDataset) -> list[str]:
    """Raw user ids by number; number 0 is padding."""
    return [str(token) for token in dataset.field2id_token[dataset.uid_field]]


def _ready_rows(dataset: FlatDataset) -> str | None:
    """Checksum of the rows of ``benchmark_filename``, which are no whole histories."""
    if dataset.list_fields:
        return None
    rows, sizes = dataset.inter_feat.interaction, torch.tensor(dataset.file_size_list)
    history = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    longest = int(rows[dataset.item_list_length_field].max())
    return files.digest(rows | {"sizes": sizes, history: rows[history][:, :longest]})


def _histories(dataset: FlatDataset) -> dict[str, Tensor]:
    """All interactions of each user in order, so that a checkpoint alone can recommend to them."""
    if not dataset.list_fields:
        return {}
    counts = torch.bincount(dataset.flat[dataset.uid_field], minlength=dataset.user_num)
    ends = counts.cumsum(0)
    return {"history_items": dataset.flat[dataset.iid_field].int(), "history_ends": ends}
