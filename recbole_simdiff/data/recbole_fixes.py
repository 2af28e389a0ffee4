"""RecBole's data set with its faults closed, one override a fault."""

import csv
import difflib
import io
import itertools
import math
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_simdiff.distributed import n_processes
from recbole_simdiff.errors import UserError

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
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} {obstacle}", keys=("dataset",)
            )
        known = self._get_download_url("url", allow_none=True)
        if known is None:
            name = self.dataset_name
            near = difflib.get_close_matches(name, self.config.known_datasets(), n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UserError(
                f"dataset={name!r} is not there: {searched} does not exist, and RecBole knows no "
                f"download of that name. {hint}Put RecBole atomic files there, or point "
                "--data_path at the folder that holds "
                f"{name}/{name}.inter",
                keys=("dataset",),
            )
        if self.config.from_checkpoint:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and a checkpoint "
                "downloads nothing. Point --data_path at the folder that holds "
                f"{self.dataset_name}/{self.dataset_name}.inter",
                keys=("dataset",),
            )
        if n_processes() > 1:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and several processes "
                f"do not download. Start once with one process, or fetch {known} by hand",
                keys=("dataset",),
            )
        try:
            super()._download()
        except (OSError, RuntimeError, ValueError) as error:
            if searched.is_file():
                return
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist and downloading {known} "
                f"failed ({error}). Fetch it by hand, unpack it there, or set --data_path",
                keys=("dataset",),
            ) from error

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        """Name the missing file and what to do."""
        names = [""]
        if (parts := self.benchmark_filename_list) is not None:
            if not isinstance(parts, list) or len(parts) != 3:
                raise UserError(
                    f"benchmark_filename={parts!r} must name three files: training, validation and "
                    "test, in this order. Without a validation, give a file of the header alone",
                    keys=("benchmark_filename",),
                )
            names = [f".{name}" for name in parts]
        for name in names:
            path = Path(dataset_path) / f"{token}{name}.inter"
            if obstacle := _obstacle(path):
                raise UserError(
                    f"dataset={token!r}: {path} {obstacle}. Put RecBole atomic files there, or "
                    f"point --data_path at the folder that holds {token}/{path.name}",
                    keys=("dataset",),
                )
        super()._load_inter_feat(token, dataset_path)

    def _load_user_or_item_feat(
        self, token: str, dataset_path: str, source: Any, field_name: str
    ) -> pd.DataFrame | None:
        """Refuse a file that is there and cannot be read; RecBole goes on without it."""
        path = Path(dataset_path) / f"{token}.{source.value}"
        obstacle = _obstacle(path)
        if obstacle not in (None, _ABSENT) and self._get_load_and_unload_col(source)[0] != set():
            raise UserError(f"dataset={token!r}: {path} {obstacle}", keys=("dataset",))
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
                f"{self.iid_field} under inter",
                keys=("load_col",),
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
                    f"field_separator={self.config['field_separator']!r}",
                    keys=("field_separator",),
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
                    "cell may hold",
                    keys=("field_separator",),
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
                f"{', '.join(sorted(both))} cannot be users and items at once",
                keys=("alias_of_user_id", "alias_of_item_id"),
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
                f'val_interval={intervals!r} must be like {{field: "[5,inf)"}}, or None',
                keys=("val_interval",),
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
                raise UserError(
                    f"val_interval: {field}={wanted!r} must be {allowed}", keys=("val_interval",)
                )
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
                    "filter_inter_by_user_or_item=False keeps such events",
                    keys=("dataset", "filter_inter_by_user_or_item"),
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
                + f" load_col={self.config['load_col']} says what is, by file: inter, user, item",
                keys=(key, "load_col"),
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
                    + (f", or {filters} leave none" if filters else ""),
                    keys=("dataset", *given),
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
            raise UserError(
                f"normalize_field={names} has no place beside normalize_all=True",
                keys=("normalize_field", "normalize_all"),
            )
        for field in names or (self.float_like_fields if everything else ()):
            self._check_loaded("normalize_field", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"normalize_field={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers",
                    keys=("normalize_field",),
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
                    f"discretization={buckets}: {field} must be among numerical_features={names}",
                    keys=("discretization", "numerical_features"),
                )
        for field in names:
            self._check_loaded("numerical_features", field)
            if "float" not in self.field2type[field].value:
                raise UserError(
                    f"numerical_features={names}: {field} is {self.field2type[field].value}; only "
                    "columns of float and float_seq are numbers",
                    keys=("numerical_features",),
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
                    f"load_col={self.config['load_col']}",
                    keys=("unused_col", "load_col"),
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
