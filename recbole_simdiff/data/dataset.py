"""Data sets: RecBole's rows and split over flat arrays, and the training rows.

RecBole writes one padded row per prefix and per loaded column. Here the interactions stay one flat
array, sorted by user and exact time; a row is a start and a length in it, and padded rows are built
for one batch at a time. Row for row they equal RecBole's.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType
from torch import Tensor

from recbole_simdiff.data.atomic_files import AtomicFile, obstacle
from recbole_simdiff.data.prefixes import ReadyPrefixes
from recbole_simdiff.data.rows import drawn_users, expand, gather_rows, windows
from recbole_simdiff.data.statistics import PrefixStatistics, Statistics
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.models.registry import needed_data_set
from recbole_simdiff.modules.batch import HISTORY_START, PSEUDO_LENGTH, ROW_START, TARGET


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


class FlatDataset(ReadyPrefixes):
    """RecBole's ``SequentialDataset`` over one flat array per column.

    After ``build``, the training part holds the rows that ``train_sampling`` asks for:

        prefix_last, prefix_all   every prefix of a user's training sequence
        user_all                  the newest MAX_ITEM_LIST_LENGTH training targets of a user, then
                                  the ones before them, ...: each target in exactly one window, but
                                  for those that ``older_windows`` leaves out

    Attributes:
        flat (dict): column -> values of all interactions, sorted by user and exact time.
        list_fields (dict): name of a sequence column -> its source column.
        pseudo (LongTensor | None): pseudo-items of each user, oldest first, 0 for none,
            [users, M]; rows have some of them in front, see ``prepend``.
        train_items (LongTensor | None): target of each training row; of the training part only.
        targets_per_batch, tokens_per_batch (float | None): expected training targets, and input
            tokens, of a full batch; of the training part only.
    """

    list_fields: dict[str, str]
    pseudo: Tensor | None = None
    train_items: Tensor | None = None
    targets_per_batch: float | None = None
    tokens_per_batch: float | None = None
    _n_ties: int | None = None  # once times are in float32 they cannot be counted

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
            self._n_ties = self._count_ties()
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

    def _count_ties(self) -> int:
        """Events whose user has an earlier event of the same time; their order is the file's."""
        return int(self.inter_feat.duplicated([self.uid_field, self.time_field]).sum())

    def data_augmentation(self) -> None:
        """One row per interaction but the first of a user, without writing the sequences out."""
        columns = self.inter_feat.interaction
        suffix = self.config["LIST_SUFFIX"]
        lists = [field + suffix for field in columns if field != self.uid_field]
        self.check_new_columns(self.item_list_length_field, *lists)
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
            drawn = drawn_users(self.user_num, self.config["train_fraction"], self.config["seed"])
            train.inter_feat = rows = train._rows(drawn[rows[self.uid_field]])
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
        user, offset = expand(count)
        return self.flat[self.iid_field][begin[user] + offset], count.cumsum(0)

    def prepend(self, pseudo: Tensor, keep_rows: bool) -> None:
        """Put pseudo-items in front of the rows that begin with a user's first item.

        A row of length l takes the min(M, L - l) pseudo-items nearest to the real ones; rows that
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
        if self.targets_per_batch is not None:
            self._count_per_batch()

    def _windows(self) -> dict[str, Tensor]:
        """Rows that cover each training target of each user once, newest window first.

        ``older_windows`` may leave out those before the newest.
        """
        target = self.inter_feat[TARGET].sort().values
        begin, n_targets = torch.unique_consecutive(
            self.inter_feat[HISTORY_START].sort().values, return_counts=True
        )
        if not torch.equal(target[n_targets.cumsum(0) - 1], begin + n_targets):
            raise UserError(
                "train_sampling=user_all needs every user's training part to be the beginning of "
                "the history; this eval_args split is not. Use train_sampling=prefix_last",
                keys=("train_sampling",),
            )
        user, start, end = windows(
            begin, n_targets, self.max_item_list_len, self.config["older_windows"]
        )
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
        row, offset = expand(target - begin)
        item = self.flat[self.iid_field][begin[row] + offset]
        keep = item != rows[self.iid_field][row]
        return row[keep], item[keep]

    def counter(self, field: str) -> Counter[Any]:
        """Counts of a column; of items, over all training targets (popularity metrics)."""
        if field == self.iid_field and self.train_items is not None:
            return Counter(self.train_items.numpy())
        return super().counter(field)

    @property
    def item_ids(self) -> list[str]:
        """Raw item ids by number; number 0 is padding."""
        return [str(token) for token in self.field2id_token[self.iid_field]]

    @property
    def user_ids(self) -> list[str]:
        """Raw user ids by number; number 0 is padding."""
        return [str(token) for token in self.field2id_token[self.uid_field]]

    def histories(self) -> dict[str, Tensor]:
        """All interactions of each user in order, so that a checkpoint alone can recommend to them.

        Returns:
            dict: ``history_items`` [n], and ``history_ends``, where each user's end, [users]; empty
                for ready-made prefixes.
        """
        if not self.list_fields:
            return {}
        counts = torch.bincount(self.flat[self.uid_field], minlength=self.user_num)
        ends = counts.cumsum(0)
        return {"history_items": self.flat[self.iid_field].int(), "history_ends": ends}

    @property
    def statistics(self) -> Statistics:
        """Users, items and actions after filtering."""
        users, items = self.user_num - 1, self.item_num - 1
        if self.benchmark_filename_list is not None:
            return PrefixStatistics(users, items, sum(self.file_size_list))
        columns = self.flat if self.list_fields else self.inter_feat
        user, item = (np.asarray(columns[name]) for name in (self.uid_field, self.iid_field))
        pairs = len(np.unique(user.astype(np.int64) * self.item_num + item))
        ties = self._n_ties
        if ties is None and self.time_field in self.inter_feat:
            ties = self._count_ties()
        return Statistics(users, items, len(user), pairs, ties)

    def item_titles(self) -> dict[str, str]:
        """Raw item id -> title from ``item_title_field`` of the .item file; empty if not asked for.

        Raises:
            UserError: if the file or the column is missing.
        """
        field = self.config["item_title_field"]
        if field is None:
            return {}
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if reason := obstacle(path):
            raise UserError(
                f"item_title_field={field!r} needs {path}, which {reason}",
                keys=("item_title_field",),
            )
        file = AtomicFile.of(str(path), self.config)
        names = {header.partition(":")[0]: header for header in file.headers}
        if field not in names or self.iid_field not in names:
            raise UserError(f"{path} has no column {field!r}; it has {', '.join(names)}")
        columns = [names[self.iid_field], names[field]]
        frame = file.read(dict.fromkeys(columns, str)).fillna("")
        known = self.field2token_id[self.iid_field]
        titles = zip(*(frame[header] for header in columns), strict=True)
        return {item: title for item, title in titles if item in known}


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
    if config.columns_note:
        logger.info(config.columns_note)
    try:
        return FlatDataset(config)
    except UserError:
        raise
    except (ValueError, KeyError, yaml.YAMLError) as error:
        place = os.path.join(config["data_path"], f"{config['dataset']}.inter")
        raise UserError(
            f"dataset={config['dataset']!r} ({place}): {error}",
            keys=("dataset",),
        ) from error
