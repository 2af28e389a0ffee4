"""Faults of RecBole's ``Dataset`` in loading files, one override a fault."""

import difflib
import itertools
import reprlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType

from recbole_simdiff.config.layers import known_datasets
from recbole_simdiff.data.atomic_files import ABSENT, AtomicFile, obstacle
from recbole_simdiff.data.download import download, is_unfinished
from recbole_simdiff.distributed import world_size
from recbole_simdiff.errors import UserError

# Whole numbers beyond it are rounded to the nearest float.
_EXACT = 2**53


class LoadingFixes(Dataset):
    """Missing files and columns are named; cells are read as they are written."""

    inter_feat: Any
    file_size_list: list[int]

    def _download(self) -> None:
        """Name the places searched when the data set is unknown; never leave half a file.

        Symptoms: the first automatic download ends in "Default process group has not been
        initialized" although the files are in place; one that is stopped leaves part of a file
        under its final name.
        """
        searched = Path(self.dataset_path) / f"{self.dataset_name}.inter"
        reason = obstacle(searched)
        if reason not in (None, ABSENT):
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} {reason}",
                keys=("dataset",),
            )
        known = self._get_download_url("url", allow_none=True)
        if known is None:
            name = self.dataset_name
            near = difflib.get_close_matches(name, known_datasets(self.config.data_root), n=1)
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
        if world_size() > 1:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and several processes "
                f"do not download. Start once with one process, or fetch {known} by hand",
                keys=("dataset",),
            )
        if self.config["offline"]:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist, and offline=True "
                f"downloads nothing. Fetch {known} by hand and unpack it there, or set --data_path",
                keys=("dataset", "offline"),
            )
        try:
            download(self.dataset_name, known, Path(self.dataset_path))
        except (OSError, ValueError) as error:
            raise UserError(
                f"dataset={self.dataset_name!r}: {searched} does not exist and downloading {known} "
                f"failed ({error}). Fetch it by hand, unpack it there, or set --data_path",
                keys=("dataset",),
            ) from error

    def _load_data(self, token: str, dataset_path: str) -> None:
        """Finish a download that was stopped; RecBole asks only whether the folder is there."""
        if is_unfinished(Path(dataset_path), token):
            self._download()
        super()._load_data(token, dataset_path)

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
            if reason := obstacle(path):
                raise UserError(
                    f"dataset={token!r}: {path} {reason}. Put RecBole atomic files there, or "
                    f"point --data_path at the folder that holds {token}/{path.name}",
                    keys=("dataset",),
                )
        super()._load_inter_feat(token, dataset_path)

    def _load_user_or_item_feat(
        self, token: str, dataset_path: str, source: Any, field_name: str
    ) -> pd.DataFrame | None:
        """Refuse a file that is there and cannot be read; RecBole goes on without it."""
        path = Path(dataset_path) / f"{token}.{source.value}"
        reason = obstacle(path)
        if reason not in (None, ABSENT) and self._get_load_and_unload_col(source)[0] != set():
            raise UserError(
                f"dataset={token!r}: {path} {reason}",
                keys=("dataset",),
            )
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
        inter = source == FeatureSource.INTERACTION
        if inter and load_col is not None and not {self.uid_field, self.iid_field} <= load_col:
            raise UserError(
                f"load_col={self.config['load_col']} must have {self.uid_field} and "
                f"{self.iid_field} under inter",
                keys=("load_col",),
            )
        if load_col == set():
            return None
        file, columns = AtomicFile.of(filepath, self.config), {}
        for header in file.headers:
            field, ftype = self._column(file, header)
            if (load_col is None or field in load_col) and field not in (unload_col or ()):
                columns[header] = field
                if source != "link":
                    self._declare(field, ftype, source)
        missing = (load_col or set()) - set(columns.values())
        if missing and inter:
            self._refuse_missing(file, missing)
        if not columns:
            return None
        dtypes = {h: np.float64 if h.endswith(":float") else str for h in columns}
        frame = file.read(dtypes).rename(columns=columns)
        if inter and f"{self.time_field}:float" in columns:
            frame = self._in_exact_order(file, frame)
        for field in frame:
            if self.field2type[field].value.endswith("seq"):
                self._split_sequences(file, frame, field)
        return frame

    def _column(self, file: AtomicFile, header: str) -> tuple[str, FeatureType]:
        """Name and type of a column.

        Raises:
            UserError: if it has none, or ids are no tokens.
        """
        field, colon, kind = header.partition(":")
        if not colon or kind not in {t.value for t in FeatureType}:
            raise UserError(
                f"{file.path}: column {header!r} must be 'name:type' with a type of "
                f"{', '.join(t.value for t in FeatureType)}; columns are separated by "
                f"field_separator={file.separator!r}",
                keys=("field_separator",),
            )
        if field in (self.uid_field, self.iid_field) and kind != "token":
            raise UserError(f"{file.path}: column {header!r} holds ids; it must be {field}:token")
        return field, FeatureType(kind)

    def _declare(self, field: str, ftype: FeatureType, source: Any) -> None:
        """Note what RecBole wants to know of a column that is loaded."""
        self.field2source[field], self.field2type[field] = source, ftype
        if not ftype.value.endswith("seq"):
            self.field2seqlen[field] = 1
        if "float" in ftype.value:
            self.field2bucketnum[field] = 2

    def _refuse_missing(self, file: AtomicFile, missing: set[str]) -> None:
        """Name columns of the interactions that the file lacks, and the key that asks for them."""
        hint = "load_col says what is needed"
        if missing & {self.uid_field, self.iid_field}:
            hint = "USER_ID_FIELD and ITEM_ID_FIELD name the columns of users and items"
        elif self.time_field in missing:
            hint = (
                "TIME_FIELD names the column of times, which order the events. A file without "
                f"times needs one, such as the number of the line as {self.time_field}:float"
            )
        raise UserError(
            f"{file.path} has no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(file.headers)}. {hint}"
        )

    def _in_exact_order(self, file: AtomicFile, frame: pd.DataFrame) -> pd.DataFrame:
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
            cells = file.cells(header)
            number, cell = next(itertools.islice(cells, first, None))
            raise UserError(
                f"{file.path}: {wrong.sum():,} of {len(times):,} events have no finite value of "
                f"{self.time_field}, which orders them; the first is event {first + 1} of the "
                f"file (line {number}: {reprlib.repr(cell)}). Fill in the times, or take these "
                "lines out"
            )
        if not len(times) or np.abs(times).max() < _EXACT:
            return frame
        exact = [Decimal(cell) for _, cell in file.cells(header)]
        order = sorted(range(len(exact)), key=exact.__getitem__)
        return frame.iloc[order].reset_index(drop=True)

    def _split_sequences(self, file: AtomicFile, frame: pd.DataFrame, field: str) -> None:
        """Text of a column -> an array per row, no longer than ``seq_len`` allows."""
        separator, numbers = file.seq_separator, self.field2type[field] == FeatureType.FLOAT_SEQ
        texts = (filter(None, cell.split(separator)) for cell in frame[field].fillna("").to_numpy())
        try:
            cells = [np.array(list(map(float, parts) if numbers else parts)) for parts in texts]
        except ValueError:
            file.refuse_number([f"{field}:float_seq"])
            raise
        limit = (self.config["seq_len"] or {}).get(field)
        if limit is not None:
            cells = [cell[:limit] for cell in cells]
        self.field2seqlen[field] = max(map(len, cells), default=0)
        frame[field] = pd.Series(cells, index=frame.index, dtype=object)

    def check_loaded(self, key: str, field: str) -> None:
        """Name ``load_col`` where a setting names a column that is not loaded."""
        if field not in self.field2type:
            near = difflib.get_close_matches(field, self.field2type, n=1)
            raise UserError(
                f"{key}={self.config[key]!r}: the column {field!r} is not loaded"
                + (f"; did you mean {near[0]}?" if near else ".")
                + f" load_col={self.config['load_col']} says what is, by file: inter, user, item",
                keys=(key, "load_col"),
            )
