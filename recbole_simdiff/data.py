"""Data sets and loaders: RecBole's split and evaluation over flat arrays, and our training batches.

RecBole writes one padded row per prefix and per loaded column. Here the
interactions stay one flat array, sorted by user and exact time; a row is a start and a
length in it, and padded rows are built for one batch at a time. Row for row they equal RecBole's.
"""

import csv
import difflib
import io
import itertools
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import recbole.data.dataset as recbole_datasets
import torch
import yaml
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader
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
# How files begin that are packed, and by what.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
# What stands for a separator of several bytes, which pandas' C engine does not know.
_UNIT_SEPARATOR = "\x1f"
# Whole numbers beyond it are rounded to the nearest float.
_EXACT = 2**53


_ABSENT = "does not exist"


def _obstacle(path: Path) -> str | None:
    """Why there is no file to read at a path; None if there is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _ABSENT
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"


class HostFixes(Dataset):
    """Overrides for faults of RecBole's ``Dataset`` on today's pandas; one method per fault."""

    inter_feat: Any
    file_size_list: list[int]
    _rest_fields: Any

    def _download(self) -> None:
        """Name the places searched when the data set is unknown; need no process group.

        Symptom: the first automatic download ends in "Default process group has not been
        initialized" although the files are in place.
        """
        searched = Path(self.dataset_path) / f"{self.dataset_name}.inter"
        obstacle = _obstacle(searched)
        if obstacle not in (None, _ABSENT):
            raise UserError(f"dataset={self.dataset_name!r}: {searched} {obstacle}")
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
        if self.config.from_checkpoint:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and a checkpoint "
                "downloads nothing. Point --data_path at the folder that holds "
                f"{self.dataset_name}/{self.dataset_name}.inter"
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
        names = [""]
        if (parts := self.benchmark_filename_list) is not None:
            if not isinstance(parts, list) or len(parts) != 3:
                raise UserError(
                    f"benchmark_filename={parts!r} must name three files: training, validation and "
                    "test, in this order. Without a validation, give a file of the header alone"
                )
            names = [f".{name}" for name in parts]
        for name in names:
            path = Path(dataset_path) / f"{token}{name}.inter"
            if obstacle := _obstacle(path):
                raise UserError(
                    f"dataset={token!r}: {path} {obstacle}. Put RecBole atomic files there, or "
                    f"point --data_path at the folder that holds {token}/{path.name}"
                )
        super()._load_inter_feat(token, dataset_path)

    def _load_user_or_item_feat(
        self, token: str, dataset_path: str, source: Any, field_name: str
    ) -> pd.DataFrame | None:
        """Refuse a file that is there and cannot be read; RecBole goes on without it."""
        path = Path(dataset_path) / f"{token}.{source.value}"
        obstacle = _obstacle(path)
        if obstacle not in (None, _ABSENT) and self._get_load_and_unload_col(source)[0] != set():
            raise UserError(f"dataset={token!r}: {path} {obstacle}")
        feat: pd.DataFrame | None = super()._load_user_or_item_feat(
            token, dataset_path, source, field_name
        )
        return feat

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
        headers = self._header(filepath)
        columns, dtypes = {}, {}
        for header in headers:
            field, colon, kind = header.partition(":")
            if not colon or kind not in {t.value for t in FeatureType}:
                raise UserError(
                    f"{filepath}: column {header!r} must be 'name:type' with a type of "
                    f"{', '.join(t.value for t in FeatureType)}; columns are separated by "
                    f"field_separator={self.config['field_separator']!r}"
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
        frame = self._read(filepath, headers, dtypes).rename(columns=columns)
        if inter and self.time_field in frame and dtypes.get(f"{self.time_field}:float"):
            frame = self._in_exact_order(filepath, headers, frame)
        for field in frame:
            if self.field2type[field].value.endswith("seq"):
                self._split_sequences(filepath, headers, frame, field)
        return frame

    def _lines(self, filepath: str) -> Iterator[str]:
        """Lines of an atomic file, without their ends.

        Raises:
            UserError: if it cannot be read, is packed or not text.
        """
        encoding = self.config["encoding"] or "utf-8"
        try:
            with open(filepath, "rb") as raw:
                begin = raw.read(8)
            for sign, packer in _PACKED.items():
                if begin.startswith(sign):
                    raise UserError(f"{filepath} is packed by {packer}; unpack it")
            with open(filepath, encoding=encoding) as file:
                for line in file:
                    yield line.rstrip("\n")
        except OSError as error:
            raise UserError(f"{filepath} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, LookupError) as error:
            place = ""
            if isinstance(error, UnicodeDecodeError):
                with open(filepath, encoding=encoding, errors="replace") as file:
                    number = next((n for n, line in enumerate(file, 1) if "\ufffd" in line), 1)
                place = f", line {number}"
            raise UserError(
                f"{filepath}{place} is not text in {encoding=} ({error}); --encoding=latin-1, for "
                "example, reads another"
            ) from error

    def _header(self, filepath: str) -> list[str]:
        """The columns of an atomic file, each name:type.

        Raises:
            UserError: if there are none, or two of one name.
        """
        line = next(self._lines(filepath), None)
        if line is None:
            raise UserError(f"{filepath} is empty; its first line names the columns")
        separator = self.config["field_separator"]
        headers = line.removeprefix("\ufeff").removesuffix(separator).split(separator)
        names = [header.partition(":")[0] for header in headers]
        for name, count in Counter(names).items():
            if count > 1:
                same = [h for h, own in zip(headers, names, strict=True) if own == name]
                raise UserError(
                    f"{filepath}, line 1: {count} columns are named {name!r} ({', '.join(same)}); "
                    "give each a name of its own"
                )
        return headers

    def _read(
        self, filepath: str, headers: Sequence[str], dtypes: Mapping[str, Any]
    ) -> pd.DataFrame:
        """Some columns of an atomic file; empty cells are NaN.

        Args:
            filepath (str): the file.
            headers (Sequence): all its columns.
            dtypes (Mapping): of those wanted.

        Raises:
            UserError: for a line with more fields than columns, or a cell that is no number.
        """
        copy = self._checked_copy(filepath, len(headers))
        try:
            frame: Any = pd.read_csv(
                filepath if copy is None else copy,
                sep=self.config["field_separator"] if copy is None else _UNIT_SEPARATOR,
                header=0,
                names=headers,
                usecols=list(dtypes),
                dtype=dtypes,
                index_col=False,
                encoding=self.config["encoding"],
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_NONE,
            )
        except ValueError as error:
            floats = [header for header in dtypes if header.endswith(":float")]
            self._refuse_number(filepath, headers, floats)
            raise UserError(f"{filepath} is not a readable atomic file: {error}") from error
        return frame[list(dtypes)]

    def _checked_copy(self, filepath: str, n_columns: int) -> io.StringIO | None:
        """The text with a separator of one byte where there is a longer one, which pandas' C
        engine does not know.

        Symptom: pandas takes the first field of a line for an index where lines have more fields
        than the header, so all columns are one off.

        Raises:
            UserError: for a line with more fields than columns.
        """
        separator = self.config["field_separator"]
        copy = io.StringIO() if len(separator.encode()) > 1 else None
        for number, line in enumerate(self._lines(filepath), start=1):
            fields = line.count(separator) + 1
            if fields > n_columns + line.endswith(separator):  # which ends the last field
                raise UserError(
                    f"{filepath}, line {number}: {fields} fields, but the header has {n_columns} "
                    f"columns. Columns are separated by field_separator={separator!r}, which no "
                    "cell may hold"
                )
            if copy is not None:
                copy.write(line.replace(separator, _UNIT_SEPARATOR) + "\n")
        if copy is not None:
            copy.seek(0)
        return copy

    def _cells(
        self, filepath: str, headers: Sequence[str], header: str
    ) -> Iterator[tuple[int, str]]:
        """Line number and text of a column's cells; lines that pandas passes over have none."""
        separator, place = self.config["field_separator"], headers.index(header)
        blank = " \t".replace(separator, "")
        for number, line in enumerate(self._lines(filepath), start=1):
            if number > 1 and line.strip(blank):
                cells = line.split(separator)
                yield number, cells[place] if place < len(cells) else ""

    def _refuse_number(self, filepath: str, headers: Sequence[str], columns: Sequence[str]) -> None:
        """Name the first cell of some columns that is no number.

        Raises:
            UserError: if there is one.
        """
        for header in columns:
            for number, cell in self._cells(filepath, headers, header):
                whole = header.endswith(":float")
                for part in [cell] if whole else cell.split(self.config["seq_separator"]):
                    try:  # pandas does not read "nan", either
                        wrong = math.isnan(float(part or 0)) and whole
                    except ValueError:
                        wrong = True
                    if wrong:
                        raise UserError(
                            f"{filepath}, line {number}: {header}={reprlib.repr(part)} is not a "
                            "number"
                        )

    def _in_exact_order(
        self, filepath: str, headers: Sequence[str], frame: pd.DataFrame
    ) -> pd.DataFrame:
        """Events with their times, which must be finite; RecBole gives those without the mean time.

        Symptom: beyond 2^53, as in nanoseconds, neighbouring times are one float, and events keep
        the order of the file. Here they are put in order of what the file says first; later sorts
        are stable.
        """
        header = f"{self.time_field}:float"
        times = frame[self.time_field].to_numpy()
        wrong = ~np.isfinite(times)
        if wrong.any():
            first = int(wrong.argmax())
            cells = self._cells(filepath, headers, header)
            number, cell = next(itertools.islice(cells, first, None))
            raise UserError(
                f"{filepath}: {wrong.sum():,} of {len(times):,} events have no finite value of "
                f"{self.time_field}, which orders them; the first is event {first + 1} of the "
                f"file (line {number}: {reprlib.repr(cell)}). Fill in the times, or take these "
                "lines out"
            )
        if not len(times) or np.abs(times).max() < _EXACT:
            return frame
        exact = [Decimal(cell) for _, cell in self._cells(filepath, headers, header)]
        order = sorted(range(len(exact)), key=exact.__getitem__)
        return frame.iloc[order].reset_index(drop=True)

    def _init_alias(self) -> None:
        """Say which columns share a numbering; of ready-made prefixes, a column and its list do.

        Symptom: unless ``alias_of_item_id`` names the column of histories, an item has one number
        there and another as a target. A name that is no column ends in "np.str_('...')".

        Raises:
            UserError: for a name that is no column of tokens, or is both a user and an item.
        """
        types = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        columns = [field for field, ftype in self.field2type.items() if ftype in types]
        groups: dict[str, list[str]] = {}
        for name, field in (("user_id", self.uid_field), ("item_id", self.iid_field)):
            given = self.config[f"alias_of_{name}"] or []
            if not isinstance(given, list) or any(name not in columns for name in given):
                raise UserError(
                    f"alias_of_{name}={given!r} must be a list of columns of tokens, of which are "
                    f"loaded: {', '.join(columns)}"
                )
            groups[name] = [field, *given]
        for field in columns if self.benchmark_filename_list is not None else ():
            name = field + self.config["LIST_SUFFIX"]
            if name in columns:
                owners = [group for group in groups.values() if field in group]
                owner = owners[0] if owners else groups.setdefault(field, [field])
                owner.append(name)
        both = set(groups["user_id"]) & set(groups["item_id"])
        if both:
            raise UserError(
                f"alias_of_user_id={self.config['alias_of_user_id']!r}, "
                f"alias_of_item_id={self.config['alias_of_item_id']!r}: "
                f"{', '.join(sorted(both))} cannot be users and items at once"
            )
        self.alias = {name: list(dict.fromkeys(group)) for name, group in groups.items()}
        taken = {field for group in self.alias.values() for field in group}
        self._rest_fields = [field for field in self.token_like_fields if field not in taken]

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

    def _filter_inter_by_user_or_item(self) -> None:
        """Say how many events RecBole leaves out for want of a line about the user or the item.

        Raises:
            UserError: if that is all of them.
        """
        if self.config["filter_inter_by_user_or_item"] is not True:
            return
        n, kept = len(self.inter_feat), np.ones(len(self.inter_feat), bool)
        for kind, field in (("user", self.uid_field), ("item", self.iid_field)):
            feat, ids = getattr(self, f"{kind}_feat"), self.inter_feat[field]
            known = None if feat is None else ids.isin(feat[field]).to_numpy()
            if known is None or known.all():
                continue
            file = f"{self.dataset_name}.{kind}"
            if {*(self.config["val_interval"] or ())} & {*feat}:
                file += f" after val_interval={self.config['val_interval']}"
            if not known.any():
                example = f"there it is {feat[field].iloc[0]!r}" if len(feat) else "it is empty"
                raise UserError(
                    f"dataset={self.dataset_name!r} ({self.dataset_path}): no event has its {kind} "
                    f"in {file}. The first {field} of the events is {ids.iloc[0]!r}, {example}; "
                    "filter_inter_by_user_or_item=False keeps such events"
                )
            self.logger.warning(
                f"{self.dataset_name}: {(~known).sum():,} of {n:,} events have {kind}s without a "
                f"line in {file} and are left out (filter_inter_by_user_or_item)"
            )
            kept &= known
        self.inter_feat = self.inter_feat[kept]

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
        keys = ["val_interval", "user_inter_num_interval", "item_inter_num_interval"]
        if self.user_feat is not None or self.item_feat is not None:
            keys.append("filter_inter_by_user_or_item")
        default = ("None", "False", "[0,inf)")  # leave nothing out
        given = [k for k in keys if str(self.config[k]).replace(" ", "") not in default]
        filters = ", ".join(f"{k}={self.config[k]}" for k in given)
        for name in self.feat_name_list:
            if getattr(self, name).empty:
                what = "interactions" if name == "inter_feat" else f"lines of {name}"
                raise UserError(
                    f"dataset={self.dataset_name!r} ({self.dataset_path}) has no {what}"
                    + (f", or {filters} leave none" if filters else "")
                )
        super()._reset_index()

    def _split_sequences(
        self, filepath: str, headers: Sequence[str], frame: pd.DataFrame, field: str
    ) -> None:
        separator = self.config["seq_separator"]
        number = self.field2type[field] == FeatureType.FLOAT_SEQ
        try:
            cells = [
                np.array(
                    [float(part) if number else part for part in cell.split(separator) if part]
                )
                for cell in frame[field].fillna("").to_numpy()
            ]
        except ValueError:
            self._refuse_number(filepath, headers, [f"{field}:float_seq"])
            raise
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
    """Counts of a data set after filtering (paper Table 1).

    Attributes:
        pairs (int | None): actions without repeated (user, item) pairs; None if nobody counted.
    """

    users: int
    items: int
    actions: int
    pairs: int | None = attribute(default=None, compare=False)

    @property
    def sparsity(self) -> float:
        """Share of the (user, item) pairs that do not occur."""
        pairs = self.actions if self.pairs is None else self.pairs
        return 1 - pairs / (self.users * self.items)

    def __str__(self) -> str:
        average = self.actions / self.users
        return (
            f"{self.users:,} users, {self.items:,} items, {self.actions:,} actions, "
            f"average length {average:.2f}, sparsity {self.sparsity:.2%}"
        )


class PrefixStatistics(Statistics):
    """Counts of ready-made prefixes, which say nothing about the length of whole histories."""

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.actions:,} ready-made prefixes"


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
                "load_col loads it"
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
            raise UserError(f"item_title_field={field!r} needs {path}, which {obstacle}")
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


class SampledEvalLoader(NegSampleEvalDataLoader):
    """RecBole's loader of sampled rankings, with each row once beside all of its candidates.

    RecBole repeats a row for each candidate, which costs a pass of the model each. The candidates
    are RecBole's: drawn user by user from the same random state.
    """

    def _init_batch_size_and_step(self) -> None:
        """Users of at most ``eval_batch_size`` rows together, at least one."""
        rows = np.sort(self.uid2items_num[self.uid_list])[::-1].cumsum()
        self.step = max(1, int((rows <= self.config["eval_batch_size"]).sum()))
        self.set_batch_size(self.step)

    def collate_fn(self, index: Any) -> tuple[Interaction, Tensor, Tensor, Tensor]:
        """Rows of some users, with what is ranked in each.

        Returns:
            tuple: rows [B], candidates with the target first [B, 1 + n], number of each row's user
            within the batch [B], and target of each row [B].
        """
        users = self.uid_list[np.array(index)]
        places = [np.arange(own.start, own.stop) for own in self.uid2index[users]]
        counts = [len(own) for own in places]
        rows = self.transform(self._dataset, self._dataset[np.concatenate(places)])
        items = rows[self.iid_field]
        candidates = []
        for user, own in zip(users, items.split(counts), strict=True):
            drawn = self._sampler.sample_by_user_ids(
                np.full(len(own), user), own.numpy(), self.neg_sample_num
            )
            candidates.append(torch.cat([own, drawn]).view(-1, len(own)).t())
        number = torch.repeat_interleave(torch.arange(len(users)), torch.tensor(counts))
        return rows, torch.cat(candidates), number, items

    def with_items(self, rows: Interaction, items: Tensor) -> Interaction:
        """The rows with other items in place of their targets, item features included.

        Args:
            rows (Interaction): of a batch, [B].
            items (LongTensor): [B].
        """
        other = Interaction({**rows.interaction, self.iid_field: items})
        joined: Interaction = self._dataset.join(other)
        return joined


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
    """(training, validation, test) loaders; None for a part without rows.

    Our models train on ``BucketLoader``; RecBole's own on RecBole's ``TrainDataLoader``. Evaluation
    is RecBole's in both cases.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): all interactions.
        pseudo (LongTensor | None): invented items of each user, put in front of training rows and,
            with ``pseudo_at_evaluation``, of validation and test rows; [users, M].

    Raises:
        UserError: if the split leaves nothing to train on, or nothing of what it holds out.
    """
    try:
        parts = dataset.build()
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"eval_args={config['eval_args']}: {error}") from error
    if config.held_out and not len(parts[1]) and not len(parts[2]):
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
    _check_negatives(config, parts, samplers)
    if config["model"] in plugin_models() and dataset.list_fields:
        train: Any = BucketLoader(config, parts[0])
    else:
        train = get_dataloader(config, "train")(
            config, parts[0], samplers[0], shuffle=config["shuffle"]
        )
    evaluation = []
    for phase, part, sampler in zip(("valid", "test"), parts[1:], samplers[1:], strict=True):
        full = get_dataloader(config, phase) is FullSortEvalDataLoader
        loader = HistoryEvalLoader if full else SampledEvalLoader
        evaluation.append(loader(config, part, sampler, shuffle=False) if len(part) else None)
    return train, *evaluation


def _check_negatives(config: Any, parts: Sequence[FlatDataset], samplers: Sequence[Any]) -> None:
    """Refuse data in which some negative cannot be drawn, which would be tried for ever.

    Args:
        config (Config): resolved configuration.
        parts (Sequence): training, validation and test part, invented items included.
        samplers (Sequence): theirs, or None.

    Raises:
        UserError: naming what draws and a row, or the one item, that leaves nothing to draw.
    """
    drawn = []  # by whom, of which parts, and whether the target is ruled out, too
    if config["sr_loss"] == "BCE":
        drawn.append((f"sr_loss=BCE of {config['model']}", parts[:1], True))
    if config["transform"] == "mask_itemseq":
        drawn.append((f"transform=mask_itemseq of {config['model']}", parts, False))
    for who, of, with_target in drawn:
        for part in of:
            user = part.has_all_items(with_target)
            if user is not None:
                raise UserError(
                    f"{who} draws items outside a row, but with MAX_ITEM_LIST_LENGTH="
                    f"{part.max_item_list_len} a row of user {user!r} holds all "
                    f"{part.item_num - 1} items there are; a smaller MAX_ITEM_LIST_LENGTH or more "
                    "items leave some to draw"
                )
    # RecBole makes samplers for full rankings, too, which nobody asks.
    asked = [True, *(config["eval_args"]["mode"][part] != "full" for part in ("valid", "test"))]
    for sampler in (one for one, use in zip(samplers, asked, strict=True) if one and use):
        n_items = sampler.item_num - 1
        if sampler.distribution == "popularity":
            n_items = len(set(sampler._get_candidates_list()))
        if n_items < 2:
            raise UserError(
                f"dataset={parts[0].dataset_name!r} ({parts[0].statistics}) has one item to draw "
                "negatives from, which is the target itself; the loss of the model, or a sampled "
                "ranking, needs two"
            )
