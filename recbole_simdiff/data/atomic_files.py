"""RecBole's atomic files: a line of columns, each ``name:type``, then one line per row.

Files are read with pandas' C engine. What it would misread without an error is refused first, with
the file and the line.
"""

import csv
import io
import math
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_simdiff.errors import UserError

# First bytes of packed files, and the packer.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

# Stands for a separator of several bytes, which pandas' C engine does not know.
_UNIT_SEPARATOR = "\x1f"

ABSENT = "does not exist"


def obstacle(path: Path) -> str | None:
    """Why there is no file to read at a path, such as ``ABSENT``; None if there is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ABSENT
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"


@dataclass(frozen=True)
class AtomicFile:
    """One atomic file.

    Attributes:
        path (str): where it is.
        separator (str): between columns.
        seq_separator (str): between the values of one cell.
        encoding (str): of the text.
    """

    path: str
    separator: str
    seq_separator: str
    encoding: str

    @classmethod
    def of(cls, path: str, config: Any) -> "AtomicFile":
        """The file at a path, with the separators and the encoding of a configuration."""
        separators = config["field_separator"], config["seq_separator"]
        return cls(path, *separators, config["encoding"] or "utf-8")

    def lines(self) -> Iterator[str]:
        """All lines, without their ends.

        Raises:
            UserError: if the file cannot be read, is packed or not text.
        """
        encoding = self.encoding
        try:
            with open(self.path, "rb") as raw:
                begin = raw.read(8)
            for sign, packer in _PACKED.items():
                if begin.startswith(sign):
                    raise UserError(f"{self.path} is packed by {packer}; unpack it")
            with open(self.path, encoding=encoding) as file:
                for line in file:
                    yield line.rstrip("\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, LookupError) as error:
            place = ""
            if isinstance(error, UnicodeDecodeError):
                with open(self.path, encoding=encoding, errors="replace") as file:
                    number = next((n for n, line in enumerate(file, 1) if "\ufffd" in line), 1)
                place = f", line {number}"
            raise UserError(
                f"{self.path}{place} is not text in {encoding=} ({error}); --encoding=latin-1, for "
                "example, reads another"
            ) from error

    @cached_property
    def headers(self) -> list[str]:
        """The columns, each ``name:type``.

        Raises:
            UserError: if there are none, or two of one name.
        """
        line = next(self.lines(), None)
        if line is None:
            raise UserError(f"{self.path} is empty; its first line names the columns")
        headers = line.removeprefix("\ufeff").removesuffix(self.separator).split(self.separator)
        names = [header.partition(":")[0] for header in headers]
        for name, count in Counter(names).items():
            if count > 1:
                same = [header for header in headers if header.partition(":")[0] == name]
                raise UserError(
                    f"{self.path}, line 1: {count} columns are named {name!r} ({', '.join(same)}); "
                    "give each a name of its own"
                )
        return headers

    def read(self, dtypes: Mapping[str, Any]) -> pd.DataFrame:
        """Some columns, in the order they are asked for; empty cells are NaN.

        Args:
            dtypes (Mapping): header -> type, of the columns to read.

        Raises:
            UserError: for a line with more fields than columns, or a cell that is no number.
        """
        copy = self._checked_copy()
        try:
            frame: Any = pd.read_csv(
                self.path if copy is None else copy,
                sep=self.separator if copy is None else _UNIT_SEPARATOR,
                header=0,
                names=self.headers,
                usecols=list(dtypes),
                dtype=dtypes,
                index_col=False,
                encoding=self.encoding,
                keep_default_na=False,
                na_values=[""],
                quoting=csv.QUOTE_NONE,
            )
        except ValueError as error:
            self.refuse_number([header for header in dtypes if header.endswith(":float")])
            raise UserError(f"{self.path} is not a readable atomic file: {error}") from error
        return frame[list(dtypes)]

    def _checked_copy(self) -> io.StringIO | None:
        """Check the number of fields of all lines; copy the text if the separator is a long one.

        The copy has a separator of one byte, as pandas' C engine needs it. Without the check,
        pandas takes the first field of a line for an index where lines have more fields than the
        header, so all columns are one off.

        Raises:
            UserError: for a line with more fields than columns.
        """
        separator, n_columns = self.separator, len(self.headers)
        copy = io.StringIO() if len(separator.encode()) > 1 else None
        for number, line in enumerate(self.lines(), start=1):
            fields = line.count(separator) + 1
            if fields > n_columns + line.endswith(separator):  # which ends the last field
                raise UserError(
                    f"{self.path}, line {number}: {fields} fields, but the header has {n_columns} "
                    f"columns. Columns are separated by field_separator={separator!r}, which no "
                    "cell may hold",
                    keys=("field_separator",),
                )
            if copy is not None:
                copy.write(line.replace(separator, _UNIT_SEPARATOR) + "\n")
        if copy is not None:
            copy.seek(0)
        return copy

    def cells(self, header: str) -> Iterator[tuple[int, str]]:
        """Line number and text of each cell of a column; lines that pandas skips have none."""
        separator, place = self.separator, self.headers.index(header)
        blank = " \t".replace(separator, "")
        for number, line in enumerate(self.lines(), start=1):
            if number > 1 and line.strip(blank):
                cells = line.split(separator)
                yield number, cells[place] if place < len(cells) else ""

    def refuse_number(self, columns: Sequence[str]) -> None:
        """Name the first cell of some columns (headers) that is not a number.

        Raises:
            UserError: if there is one.
        """
        for header in columns:
            for number, cell in self.cells(header):
                whole = header.endswith(":float")
                for part in [cell] if whole else cell.split(self.seq_separator):
                    try:  # pandas does not read "nan", either
                        wrong = math.isnan(float(part or 0)) and whole
                    except ValueError:
                        wrong = True
                    if wrong:
                        raise UserError(
                            f"{self.path}, line {number}: {header}={reprlib.repr(part)} is not a "
                            "number"
                        )
