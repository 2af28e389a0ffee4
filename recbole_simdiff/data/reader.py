"""Files of raw data, line by line or row by row: plain text, gzip or Parquet."""

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from recbole_simdiff.data.parquet import MAGIC, open_parquet, parquet_rows
from recbole_simdiff.data.raw_formats import Format
from recbole_simdiff.data.tables import TableColumns
from recbole_simdiff.errors import UserError

_SHOWN = 5  # malformed lines

_LINES_A_TICK = 4096  # between two looks at how far a file is


class Reader:
    """Parsed lines of text files, plain or gzip, and rows of Parquet files.

    Attributes:
        malformed (int): lines that could not be read.
        shown (list): the first of them, with file, number and reason.
        formats (dict): path -> what the file was read as.

    Args:
        skip_malformed (bool): count lines that cannot be read instead of stopping at the first.
    """

    def __init__(self, skip_malformed: bool) -> None:
        self.skip, self.malformed, self.shown = skip_malformed, 0, list[str]()
        self.formats = dict[Path, str]()
        self._place: tuple[Path, str, bytes] = (Path(), "", b"")

    def refuse(self, reason: object) -> None:
        """The line at hand is malformed.

        Raises:
            UserError: unless malformed lines are skipped.
        """
        path, place, line = self._place
        message = f"{path}, {place}: {reason}: {_excerpt(line)}"
        if not self.skip:
            raise UserError(f"{message}. --skip_malformed counts such lines and goes on")
        self.malformed += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(message)

    def records(
        self, formats: Sequence[Format] | TableColumns, paths: Sequence[Path]
    ) -> Iterator[Any]:
        """What each line says, in order; blank ones are passed over.

        Args:
            formats (Sequence | TableColumns): what a file may be, of which its first line decides;
                or the columns of a table.
            paths (Sequence): the files.

        Raises:
            UserError: if a file is missing, damaged, of an unknown kind or malformed.
        """
        for path in paths:
            try:
                if not path.is_file():
                    raise UserError(
                        f"{path} is not a file; give files as downloaded, out of archives"
                    )
                with open(path, "rb"):
                    pass
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
        total = sum(path.stat().st_size for path in paths)
        with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path in paths:
                before = bar.n
                yield from self._file(formats, path, bar)
                bar.update(before + path.stat().st_size - bar.n)

    def _file(
        self, formats: Sequence[Format] | TableColumns, path: Path, bar: Any
    ) -> Iterator[Any]:
        with open(path, "rb") as raw:
            begin = raw.read(len(MAGIC))
        if begin != MAGIC:
            yield from self._lines(formats, path, bar)
        elif isinstance(formats, TableColumns):
            yield from self._rows(formats, path)
        else:
            raise UserError(f"{path} is a Parquet file, which --source=table reads")

    def _rows(self, table: TableColumns, path: Path) -> Iterator[Any]:
        """What each row of a Parquet file says."""
        file = open_parquet(path)
        names = file.schema_arrow.names
        table.require(names, str(path))
        chosen = [names[place] for place in table.places(names)]
        self.formats[path] = f"Parquet, columns {', '.join(chosen)}"
        for number, row in enumerate(parquet_rows(path, file, chosen), start=1):
            self._place = path, f"row {number}", str(row).encode(errors="replace")
            try:
                record = table.interaction(row)
            except ValueError as error:
                self.refuse(error)
                continue
            yield record

    def _lines(
        self, formats: Sequence[Format] | TableColumns, path: Path, bar: Any
    ) -> Iterator[Any]:
        """What each line of a text file says."""
        form, number, before = None, 0, bar.n
        with open(path, "rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            lines: Iterable[bytes] = (
                io.BufferedReader(gzip.GzipFile(fileobj=raw)) if packed else raw
            )
            try:
                for number, line in enumerate(lines, start=1):
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if number % _LINES_A_TICK == 0:
                        bar.update(before + raw.tell() - bar.n)
                    if line.isspace() or not line:
                        continue
                    if form is None:
                        form = _format(formats, path, line)
                        self.formats[path] = form.name
                        if form.header:
                            continue
                    self._place = path, f"line {number}", line
                    try:
                        record = form.parse(_decode(line, form).rstrip("\r\n"))
                    except ValueError as error:
                        self.refuse(error)
                        continue
                    yield record
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is damaged after line {number}: {error}") from error


def _format(formats: Sequence[Format] | TableColumns, path: Path, line: bytes) -> Format:
    text = line.decode(errors="replace").rstrip("\r\n")
    if isinstance(formats, TableColumns):
        try:
            return formats.format_of(text)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    for form in formats:
        if form.fits(text):
            return form
    raise UserError(
        f"{path} begins with {_excerpt(line)}, which is none of: "
        f"{'; '.join(form.name for form in formats)} (plain or .gz)"
    )


def _decode(line: bytes, form: Format) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        if not form.latin:
            raise
        return line.decode("latin-1")


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").rstrip("\r\n")
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
