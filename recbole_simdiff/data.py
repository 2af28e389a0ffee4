"""Data sets and loaders: RecBole's split and evaluation over flat arrays, and our training batches.

RecBole writes one padded row per prefix and per loaded column. Here the
interactions stay one flat array, sorted by user and exact time; a row is a start and a
length in it, and padded rows are built for one batch at a time. Row for row they equal RecBole's.
"""

import csv
import difflib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import recbole.data.dataset as recbole_datasets
import torch
import yaml
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_simdiff.distributed import n_processes, own_rows
from recbole_simdiff.encoder import PSEUDO_LENGTH, ROW_NUMBER, ROW_START
from recbole_simdiff.errors import UserError
from recbole_simdiff.models import needed_data_set, plugin_models

# Where a row's history begins in the flat array, and where its target is.
HISTORY_START, TARGET = "_history_start", "_target"


class HostFixes(Dataset):
    """Overrides for faults of RecBole's ``Dataset`` on today's pandas; one method per fault."""

    inter_feat: Any
    _rest_fields: Any

    def _download(self) -> None:
        """Name the places searched when the data set is unknown; need no process group.

        Symptom: the first automatic download ends in "Default process group has not been
        initialized" although the files are in place.
        """
        searched = Path(self.dataset_path) / f"{self.dataset_name}.inter"
        known = self._get_download_url("url", allow_none=True)
        if known is None:
            name = self.dataset_name
            near = difflib.get_close_matches(name, self.config.known_datasets(), n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(
                f"dataset={name!r} is not there: {searched} does not exist, and RecBole knows no "
                f"download of that name. {hint}Put RecBole atomic files there, or point "
                "--data_path at the folder that holds "
                f"{name}/{name}.inter"
            )
        if n_processes() > 1:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and several processes "
                f"do not download. Start once with one process, or fetch {known} by hand"
            )
        try:
            super()._download()
        except (OSError, RuntimeError, ValueError) as error:
            if searched.is_file():
                return
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist and downloading {known} "
                f"failed ({error}). Fetch it by hand, unpack it there, or set --data_path"
            ) from error

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        """Name the missing file and what to do."""
        names = [f".{name}" for name in self.benchmark_filename_list or []] or [""]
        for name in names:
            path = Path(dataset_path) / f"{token}{name}.inter"
            if not path.is_file():
                raise UserError(
                    f"dataset={token!r}: {path} does not exist. Put RecBole atomic files there, or "
                    f"point --data_path at the folder that holds {token}/{path.name}"
                )
        super()._load_inter_feat(token, dataset_path)

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        """Read an atomic file with pandas' C engine; ids such as NA and null stay ids.

        Symptoms: an in-place ``fillna`` that pandas 3 ignores breaks empty sequence cells; users or
        items called "NA" or "None" are dropped; the Python engine is much slower.
        """
        load_col, unload_col = self._get_load_and_unload_col(source)
        inter = getattr(source, "value", source) == "inter"
        if inter and load_col is not None and not {self.uid_field, self.iid_field} <= load_col:
            raise UserError(
                f"load_col={self.config['load_col']} must have {self.uid_field} and "
                f"{self.iid_field} under inter"
            )
        if load_col == set():
            return None
        separator = self.config["field_separator"]
        headers = self._header(filepath, separator)
        columns, dtypes = {}, {}
        for header in headers:
            field, colon, kind = header.partition(":")
            if not colon or kind not in {t.value for t in FeatureType}:
                raise UserError(
                    f"{filepath}: column {header!r} must be 'name:type' with a type of "
                    f"{', '.join(t.value for t in FeatureType)}; columns are separated by "
                    f"field_separator={separator!r}"
                )
            if field in (self.uid_field, self.iid_field) and kind != "token":
                raise UserError(
                    f"{filepath}: column {header!r} holds ids; it must be {field}:token"
                )
            if (load_col is not None and field not in load_col) or field in (unload_col or ()):
                continue
            ftype = FeatureType(kind)
            if source != "link":
                self.field2source[field], self.field2type[field] = source, ftype
                if not kind.endswith("seq"):
                    self.field2seqlen[field] = 1
                if "float" in kind:
                    self.field2bucketnum[field] = 2
            columns[header] = field
            dtypes[header] = np.float64 if ftype == FeatureType.FLOAT else str
        missing = (load_col or set()) - set(columns.values())
        if missing and inter:
            hint = "load_col says what is needed"
            if missing & {self.uid_field, self.iid_field}:
                hint = "USER_ID_FIELD and ITEM_ID_FIELD name the columns of users and items"
            elif self.time_field in missing:
                hint = (
                    "TIME_FIELD names the column of times, which order the events. A file without "
                    f"times needs one, such as the number of the line as {self.time_field}:float"
                )
            raise UserError(
                f"{filepath} has no column {', '.join(sorted(missing))}; it has "
                f"{', '.join(headers)}. {hint}"
            )
        if not columns:
            return None
        try:
            frame: Any = pd.read_csv(
                filepath,
                sep=separator,
                usecols=list(columns),
                dtype=dtypes,
                encoding=self.config["encoding"],
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_NONE,
            )
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{filepath} is not a readable atomic file: {error}") from error
        frame = frame[list(columns)].rename(columns=columns)
        if inter and self.time_field in frame and dtypes.get(f"{self.time_field}:float"):
            self._check_times(filepath, frame[self.time_field])
        for field in frame:
            if self.field2type[field].value.endswith("seq"):
                self._split_sequences(frame, field)
        return frame

    def _header(self, filepath: str, separator: str) -> list[str]:
        encoding = self.config["encoding"] or "utf-8"
        try:
            with open(filepath, encoding=encoding) as file:
                line = file.readline().removeprefix("\ufeff").rstrip("\r\n")
        except (UnicodeDecodeError, LookupError) as error:
            raise UserError(
                f"{filepath} is not text in {encoding=} ({error}); --encoding=latin-1, for "
                "example, reads another"
            ) from error
        return line.split(separator)

    @staticmethod
    def _check_times(filepath: str, times: pd.Series) -> None:
        """Events without a time have no place in a sequence; RecBole gives them the mean time."""
        wrong = ~np.isfinite(times.to_numpy())
        if wrong.any():
            raise UserError(
                f"{filepath}: {wrong.sum():,} of {len(times):,} events have no finite value of "
                f"{times.name}, which orders them; the first is event {wrong.argmax() + 1} of the "
                "file. Fill in the times, or take these lines out"
            )

    def _filter_nan_user_or_item(self) -> None:
        """Leave out lines without a user or an item.

        Symptom: once a line has no user, RecBole drops a wrong line for each without an item, and
        item 0 remains in the sequences.
        """
        for name, fields in (
            ("inter_feat", [self.uid_field, self.iid_field]),
            ("user_feat", [self.uid_field]),
            ("item_feat", [self.iid_field]),
        ):
            feat = getattr(self, name)
            missing = feat[fields].isna().any(axis=1) if feat is not None else np.array([])
            if missing.any():
                self.logger.warning(
                    f"{self.dataset_name}: {missing.sum():,} of {len(feat):,} lines of {name} have "
                    f"no {' or no '.join(fields)} and are left out"
                )
                setattr(self, name, feat[~missing])

    def _filter_by_field_value(self) -> None:
        """Refuse what RecBole cannot filter by.

        Symptom: at text that is no interval it warns, filters nothing and drops the last line but
        one; other faults of ``val_interval`` end in tracebacks.
        """
        intervals = self.config["val_interval"]
        if not isinstance(intervals, dict | None):
            raise UserError(
                f'val_interval={intervals!r} must be like {{field: "[5,inf)"}}, or None'
            )
        for field, wanted in (intervals or {}).items():
            if self.field2type.get(field) in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                allowed = 'an interval such as "[5,inf)"'
                try:
                    parsed = self._parse_intervals_str(wanted) or ()
                except (IndexError, ValueError):
                    parsed = ()
                good = len(parsed) == str(wanted).count(";") + 1
            else:
                allowed = "a list of values as text, such as ['1', '2']"
                good = isinstance(wanted, list) and all(isinstance(v, str) for v in wanted)
            self._check_loaded("val_interval", field)
            if not good:
                raise UserError(f"val_interval: {field}={wanted!r} must be {allowed}")
        super()._filter_by_field_value()

    def _check_loaded(self, key: str, field: str) -> None:
        """Name ``load_col`` where a setting names a column that is not loaded."""
        if field not in self.field2type:
            near = difflib.get_close_matches(field, self.field2type, n=1)
            raise UserError(
                f"{key}={self.config[key]!r}: the column {field!r} is not loaded"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" load_col={self.config['load_col']} says what is, by file: inter, user, item"
            )

    def _reset_index(self) -> None:
        """Say what filtered when nothing is left."""
        if self.inter_feat.empty:
            keys = ("val_interval", "user_inter_num_interval", "item_inter_num_interval")
            filters = ", ".join(f"{k}={self.config[k]}" for k in keys if self.config[k] is not None)
            raise UserError(
                f"dataset={self.dataset_name!r} ({self.dataset_path}) has no interactions"
                + (f", or {filters} leave none" if filters else "")
            )
        super()._reset_index()

    def _split_sequences(self, frame: pd.DataFrame, field: str) -> None:
        separator = self.config["seq_separator"]
        number = self.field2type[field] == FeatureType.FLOAT_SEQ
        cells = [
            np.array([float(part) if number else part for part in cell.split(separator) if part])
            for cell in frame[field].fillna("").to_numpy()
        ]
        limit = (self.config["seq_len"] or {}).get(field)
        if limit is not None:
            cells = [cell[:limit] for cell in cells]
        self.field2seqlen[field] = max(map(len, cells), default=0)
        frame[field] = pd.Series(cells, index=frame.index, dtype=object)

    def _fill_nan(self) -> None:
        """Fill missing tokens with 0, missing floats with the mean, missing sequences with none.

        Symptom: on pandas 3 RecBole's in-place ``fillna`` does nothing; missing floats stay NaN and
        missing tokens become the id -9223372036854775808.
        """
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in feat:
                ftype = self.field2type[field]
                if ftype == FeatureType.TOKEN:
                    feat[field] = feat[field].fillna(0)
                elif ftype == FeatureType.FLOAT:
                    feat[field] = feat[field].fillna(feat[field].mean())
                elif feat[field].isna().any():  # rows that a merge added, e.g. for padding
                    cells = [np.array([]) if isinstance(c, float) else c for c in feat[field]]
                    feat[field] = pd.Series(cells, index=feat.index, dtype=object)

    def _set_label_by_threshold(self) -> None:
        for field in self.config["threshold"] or ():
            self._check_loaded("threshold", field)
        super()._set_label_by_threshold()

    def _normalize(self) -> None:
        """Scale columns of numbers to [0, 1].

        Symptom: as in ``_remap``, for columns of sequences.
        """
        names, everything = self.config["normalize_field"], self.config["normalize_all"]
        if names and everything:
            raise UserError(f"normalize_field={names} has no place beside normalize_all=True")
        for field in names or (self.float_like_fields if everything else ()):
            self._check_loaded("normalize_field", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"normalize_field={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers"
                )
            for feat in self.field2feats(field):
                values, ends = self._numbers(feat, field)
                low, high = values.min(initial=np.inf), values.max(initial=-np.inf)
                if low < high:
                    values = (values - low) / (high - low)
                else:
                    self.logger.warning(f"all values of {field} are the same")
                    values = np.ones_like(values)
                parts = np.split(values, ends)
                feat[field] = (
                    values
                    if self.field2type[field] == FeatureType.FLOAT
                    else pd.Series(parts, index=feat.index, dtype=object)
                )

    def _discretization(self) -> None:
        """Turn numerical features into pairs (weight, row of an embedding table).

        Symptom: as in ``_remap``, for columns of sequences.
        """
        buckets, names = self.config["discretization"] or {}, self.config["numerical_features"]
        for field in buckets:
            if field not in names:
                raise UserError(
                    f"discretization={buckets}: {field} must be among numerical_features={names}"
                )
        for field in names:
            self._check_loaded("numerical_features", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"numerical_features={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers"
                )
            for feat in self.field2feats(field):
                weight, ends = self._numbers(feat, field)
                row = np.ones_like(weight)
                if field in buckets:
                    row, weight = _buckets(weight, **buckets[field]), row
                    self.field2bucketnum[field] = int(row.max(initial=0)) + 1
                if self.field2type[field] == FeatureType.FLOAT:
                    pairs: list[Any] = np.stack([weight, row], axis=-1).tolist()
                else:
                    pairs = list(zip(np.split(weight, ends), np.split(row, ends), strict=True))
                feat[field] = pd.Series(pairs, index=feat.index, dtype=object)

    def _numbers(self, feat: pd.DataFrame, field: str) -> tuple[np.ndarray, np.ndarray]:
        """All numbers of a column in a row, and where each cell but the last ends."""
        if self.field2type[field] == FeatureType.FLOAT:
            return feat[field].to_numpy(copy=True), np.arange(1, len(feat))
        cells = [np.asarray(cell, dtype=float) for cell in feat[field]]
        ends = np.cumsum([len(cell) for cell in cells])[:-1]
        return np.concatenate([*cells, np.array([])]), ends

    def _remap_ID_all(self) -> None:  # noqa: N802, RecBole's name
        """Number the tokens of additional files, too.

        Symptom: RecBole numbers them only where an alias names them; elsewhere they stay text, of
        which no tensor can be made.
        """
        named = {field for alias in self.alias.values() for field in alias}
        others = [
            field
            for field, source in self.field2source.items()
            if not isinstance(source, FeatureSource)
            and "token" in self.field2type[field].value
            and field not in named
        ]
        self._rest_fields = [*self._rest_fields, *others]
        super()._remap_ID_all()

    def _drop_unused_col(self) -> None:
        for name in self.config["unused_col"] or ():
            if getattr(self, f"{name}_feat", None) is None:
                raise UserError(
                    f"unused_col={self.config['unused_col']}: no column of .{name} is loaded; "
                    f"load_col={self.config['load_col']}"
                )
        super()._drop_unused_col()

    def _remap(self, remap_list: list[tuple[pd.DataFrame, str, Any]]) -> None:
        """Number the tokens from 1, missing ones 0.

        Symptom: pandas 3 hands ``agg(len)`` the whole column, so token sequences fail with "Length
        of values does not match length of index".
        """
        if not remap_list:
            return
        flat = [
            feat[field].to_numpy(dtype=object)
            if ftype == FeatureType.TOKEN
            else np.concatenate(
                [np.asarray(c, dtype=object) for c in feat[field]] or [np.array([], object)]
            )
            for feat, field, ftype in remap_list
        ]
        ids, tokens = pd.factorize(np.concatenate(flat))
        names = np.array(["[PAD]", *tokens])
        parts = np.split(ids + 1, np.cumsum([len(part) for part in flat])[:-1])
        for (feat, field, ftype), part in zip(remap_list, parts, strict=True):
            if field not in self.field2id_token:
                self.field2id_token[field] = names
                self.field2token_id[field] = {token: i for i, token in enumerate(names)}
            if ftype == FeatureType.TOKEN:
                feat[field] = part
            else:
                ends = np.cumsum([len(cell) for cell in feat[field]])[:-1]
                cells = np.split(part, ends)
                feat[field] = pd.Series(cells, index=feat.index, dtype=object)

    def _remove_duplication(self) -> None:
        """Drop repeated (user, item) pairs in stable time order.

        Symptom: RecBole sorts with an unstable algorithm, so equal times of a user (days, in the
        Amazon data) lose their order in the file.
        """
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        if self.time_field in self.inter_feat:
            self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable")
        self.inter_feat = self.inter_feat.drop_duplicates(
            [self.uid_field, self.iid_field], keep=keep
        )

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        """Copy the arrays: pandas 3 hands out read-only ones, which torch must not share."""
        columns = {k: SimpleNamespace(values=data[k].to_numpy(copy=True)) for k in data}
        converted: Interaction = super()._dataframe_to_interaction(columns)
        return converted


def _buckets(values: np.ndarray, method: str, bucket: int = 0) -> np.ndarray:
    """RecBole's buckets of numbers: ED, of equal width; LD, by the square of the logarithm."""
    if method == "ED":
        low, high = values.min(initial=np.inf), values.max(initial=-np.inf) + 1e-9
        if low == high:
            return np.full_like(values, bucket)
        return np.floor((values - low) * bucket / (high - low) + 1)
    large = values > 2
    powers = np.floor(np.log(values * large + 1e-9) ** 2 + 1)
    return np.unique(np.where(large, powers, values), return_inverse=True)[1].astype(float)


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


@dataclass(frozen=True)
class Statistics:
    """Counts of a data set after filtering (paper Table 1)."""

    users: int
    items: int
    actions: int

    def __str__(self) -> str:
        average = self.actions / self.users
        sparsity = 1 - self.actions / (self.users * self.items)
        return (
            f"{self.users:,} users, {self.items:,} items, {self.actions:,} actions, "
            f"average length {average:.2f}, sparsity {sparsity:.2%}"
        )


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
        """Newest items and lengths of pre-split sequences; ``agg(len)`` fails on pandas 3."""
        for field in self.inter_feat:
            if field + self.config["LIST_SUFFIX"] in self.inter_feat:
                setattr(self, f"{field}_list_field", field + self.config["LIST_SUFFIX"])
        length, history = self.item_list_length_field, self.item_id_list_field
        self._check_new_columns(length)
        self.set_field_property(
            length, FeatureType.TOKEN, recbole_datasets.dataset.FeatureSource.INTERACTION, 1
        )
        # RecBole applies no limit here, and models fail on rows beyond their last position.
        newest = [cell[-self.max_item_list_len :] for cell in self.inter_feat[history]]
        self.inter_feat[history] = pd.Series(newest, index=self.inter_feat.index, dtype=object)
        self.field2seqlen[history] = min(self.field2seqlen[history], self.max_item_list_len)
        self.inter_feat[length] = [len(cell) for cell in newest]

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
                f"splitting: {self.statistics}"
            )
        if self.config["train_fraction"] < 1:
            train.inter_feat = rows = train._rows(self._drawn_users()[rows[self.uid_field]])
        train.train_items = rows[self.iid_field].clone()
        style = self.config["train_sampling"]
        if style == "user_all":
            if not self.list_fields:
                raise UserError(
                    "train_sampling=user_all needs one interaction a line; benchmark_filename "
                    "gives ready-made prefixes, which train_sampling=prefix_last can use"
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
                "the history; this eval_args split is not. Use train_sampling=prefix_last"
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

    def counter(self, field: str) -> Counter[Any]:
        """Counts of a column; of items, over all training targets (popularity metrics)."""
        if field == self.iid_field and hasattr(self, "train_items"):
            return Counter(self.train_items.numpy())
        return super().counter(field)

    @property
    def statistics(self) -> Statistics:
        """Users, items and actions after filtering."""
        actions = len(self.flat[self.uid_field]) if self.list_fields else len(self.inter_feat)
        return Statistics(self.user_num - 1, self.item_num - 1, actions)

    def item_titles(self) -> dict[str, str]:
        """Raw item id -> title from ``item_title_field`` of the .item file; empty if not asked for.

        Raises:
            UserError: if the file or the column is missing.
        """
        field = self.config["item_title_field"]
        if field is None:
            return {}
        path = Path(self.dataset_path) / f"{self.dataset_name}.item"
        if not path.is_file():
            raise UserError(f"item_title_field={field!r} needs {path}, which does not exist")
        separator = self.config["field_separator"]
        header = [name.partition(":")[0] for name in self._header(str(path), separator)]
        if field not in header or self.iid_field not in header:
            raise UserError(f"{path} has no column {field!r}; it has {', '.join(header)}")
        try:
            frame: Any = pd.read_csv(
                path,
                sep=separator,
                header=0,
                names=header,
                usecols=[self.iid_field, field],
                dtype=str,
                encoding=self.config["encoding"],
                keep_default_na=False,
                quoting=csv.QUOTE_NONE,
            )
        except ValueError as error:
            raise UserError(f"{path} is not a readable atomic file: {error}") from error
        known = self.field2token_id[self.iid_field]
        titles = zip(frame[self.iid_field], frame[field], strict=True)
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


class BucketLoader:
    """Training batches of rows of similar length, trimmed to the longest; exact order per epoch.

    Rows are shuffled, sorted by length and cut into batches, and the batches are shuffled; the
    order depends on the seed and the epoch only, so a batch can be found again after a restart. The
    flat item array lives on the training device and batches are gathered there.

    Paper, Code: random batches. Here: in-batch negatives of a contrastive loss come from histories
    of similar length.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): the training part.
    """

    def __init__(self, config: Any, dataset: FlatDataset) -> None:
        self.config, self.dataset, self._dataset = config, dataset, dataset
        self.batch_size: int = config["train_batch_size"]
        self.shuffle: bool = config["shuffle"]
        self.epoch = 0
        device = config["device"]
        rows = dataset.inter_feat
        self._lengths = rows[dataset.item_list_length_field]
        fields = [ROW_START, TARGET, *([PSEUDO_LENGTH] if dataset.pseudo is not None else [])]
        self._rows = {field: rows[field].to(device) for field in fields}
        self._pseudo = None if dataset.pseudo is None else dataset.pseudo.to(device)
        self._device_lengths = self._lengths.to(device)
        self._users = rows[dataset.uid_field].to(device)
        self._items = dataset.flat[dataset.iid_field].to(device)
        self._list_field = dataset.iid_field + config["LIST_SUFFIX"]

    def __len__(self) -> int:
        return -(-len(self._lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def batches(self) -> list[Tensor]:
        """Row indices of every batch of the current epoch, in order."""
        if not self.shuffle:
            return list(torch.split(torch.arange(len(self._lengths)), self.batch_size))
        generator = torch.Generator().manual_seed(self.config["seed"] * 1_000_003 + self.epoch)
        order = torch.randperm(len(self._lengths), generator=generator)
        order = order[self._lengths[order].argsort(stable=True)]
        batches = torch.split(order, self.batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def __iter__(self) -> Iterator[Interaction]:
        for index in self.batches():
            yield self.collate(index)

    def collate(self, index: Tensor) -> Interaction:
        """This process's rows as a right-padded batch, no longer than its longest row."""
        dataset, index = self.dataset, own_rows(index)
        longest = int(self._lengths[index].max())
        index = index.to(self._items.device)
        user, length = self._users[index], self._device_lengths[index]
        row = {field: values[index] for field, values in self._rows.items()}
        extra = {} if self._pseudo is None else {PSEUDO_LENGTH: row[PSEUDO_LENGTH]}
        items = gather_rows(
            self._items,
            row[ROW_START],
            length,
            longest,
            row.get(PSEUDO_LENGTH),
            None if self._pseudo is None else self._pseudo[user],
        )
        return Interaction(
            {
                dataset.uid_field: user,
                self._list_field: items,
                dataset.item_list_length_field: length,
                dataset.iid_field: self._items[row[TARGET]],
                ROW_NUMBER: index,
                **extra,
            }
        )


class HistoryEvalLoader(FullSortEvalDataLoader):
    """RecBole's full-ranking loader, with each row's history for the history-removed protocol.

    The second element of a batch is (row, item) pairs instead of None; the trainer ranks once with
    and once without them.
    """

    def collate_fn(self, index: Any) -> tuple[Any, Any, Tensor, Tensor] | None:
        """Rows of this process, history pairs, and the position and id of the targets.

        Returns:
            tuple | None: None if the batch has fewer rows than there are processes, and none here.
        """
        index = own_rows(index)
        if len(index) == 0:
            return None
        interaction, _, positive_u, positive_i = super().collate_fn(index)
        dataset = self._dataset
        history = dataset.history(interaction) if dataset.list_fields else None
        return interaction, history, positive_u, positive_i


def create_dataset(config: Any) -> FlatDataset:
    """The data set of a configuration, built from its files.

    Raises:
        UserError: if a file or column is missing, or the model is not sequential.
    """
    special = needed_data_set(config["model"])
    if special is not None:
        raise UserError(
            f"model={config['model']} needs RecBole's {special}, which is not supported"
        )
    try:
        return FlatDataset(config)
    except UserError:
        raise
    except (ValueError, KeyError, yaml.YAMLError) as error:
        place = os.path.join(config["data_path"], f"{config['dataset']}.inter")
        raise UserError(f"dataset={config['dataset']!r} ({place}): {error}") from error


def create_loaders(
    config: Any, dataset: FlatDataset, pseudo: Tensor | None = None
) -> tuple[Any, Any, Any]:
    """(training, validation, test) loaders.

    Our models train on ``BucketLoader``; RecBole's own on RecBole's ``TrainDataLoader``. Evaluation
    is RecBole's in both cases.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): all interactions.
        pseudo (LongTensor | None): invented items of each user, put in front of training rows and,
            with ``pseudo_at_evaluation``, of validation and test rows; [users, M].

    Raises:
        UserError: if the split leaves nothing to train or to evaluate on.
    """
    try:
        parts = dataset.build()
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"eval_args={config['eval_args']}: {error}") from error
    if not len(parts[1]) and not len(parts[2]):
        raise UserError(
            f"dataset={dataset.dataset_name!r} ({dataset.statistics}): no user has enough "
            "interactions for validation or test under the split of eval_args"
        )
    if pseudo is not None:
        if len(pseudo) != dataset.user_num:
            raise UserError(
                f"the invented items are those of {len(pseudo) - 1} users, but the data set "
                f"{dataset.dataset_name!r} at {dataset.dataset_path} has {dataset.statistics}"
            )
        parts[0].prepend(pseudo, keep_rows=config["pseudo_mix"] == "both")
        for part in parts[1:] if config["pseudo_at_evaluation"] else ():
            part.prepend(pseudo, keep_rows=False)
    samplers = create_samplers(config, dataset, parts)
    if config["model"] in plugin_models() and dataset.list_fields:
        train: Any = BucketLoader(config, parts[0])
    else:
        train = get_dataloader(config, "train")(
            config, parts[0], samplers[0], shuffle=config["shuffle"]
        )
    evaluation = []
    for phase, part, sampler in zip(("valid", "test"), parts[1:], samplers[1:], strict=True):
        loader = get_dataloader(config, phase)
        if loader is FullSortEvalDataLoader:
            loader = HistoryEvalLoader
        evaluation.append(loader(config, part, sampler, shuffle=False) if len(part) else None)
    return train, *evaluation
