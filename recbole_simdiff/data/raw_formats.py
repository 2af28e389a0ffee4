"""Raw downloads line by line: what each source writes and how it is read."""

import ast
import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from recbole_simdiff.errors import UserError

Array = NDArray[Any]

# User, item, rating, time in microseconds, and the unit it was told in ("" if in none).
Interaction = tuple[str, str, float, int, str]

Title = tuple[str, str]  # item, title

_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d:\d\d)?", re.ASCII)

LAST_SECOND = 24 * 60 * 60 - 1  # of a day

MICRO = 10**6  # microseconds of a second

# Unit -> how many make a second. A number below 10^11 of a unit is before the year 5138, and at
# least 10^11 of the next finer one is after March 1973.
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}

_MOST_SECONDS = 10**11

# What would break a line of a tab-separated UTF-8 file.
_UNFIT = re.compile("[\t\n\r\0\ud800-\udfff]")

_SHOWN = 5  # malformed lines

_LINES_A_TICK = 4096  # between two looks at how far a file is


def _id(value: Any) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text.strip() or _UNFIT.search(text):
        raise ValueError(f"{value!r} is not an id")
    return text


def _rating(value: Any) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"rating {value!r} is not a number")
    return number


def _time(value: Any) -> tuple[int, str]:
    """Microseconds since 1970, and the unit that the value must be in, by its size."""
    try:
        number = int(str(value))
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"time {value!r} is not a whole number of seconds or a finer unit")
    unit = next(name for name, n in _UNITS.items() if abs(number) < _MOST_SECONDS * n)
    return number * MICRO // _UNITS[unit], unit


def parse_date(value: Any) -> int:
    """Seconds since 1970 of a date, read as UTC."""
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise ValueError(f"date {value!r} is not YYYY-MM-DD or YYYY-MM-DD HH:MM:SS")
    return int(datetime.fromisoformat(value).replace(tzinfo=UTC).timestamp())


def _object(text: str, loose: bool = False) -> dict[str, Any]:
    """A JSON object; ``loose`` allows a Python literal, as in some of the Amazon 2014 files."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not loose:
            raise ValueError(f"not JSON ({error})") from None
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _values(record: dict[str, Any], *names: str) -> list[Any]:
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"no field {', '.join(missing)}")
    return [record[name] for name in names]


def _amazon_review(text: str) -> list[Interaction]:
    user, item, rating, time = _values(
        _object(text, loose=True), "reviewerID", "asin", "overall", "unixReviewTime"
    )
    return [(_id(user), _id(item), _rating(rating), *_time(time))]


def _yelp_review(text: str) -> list[Interaction]:
    user, item, rating, date = _values(_object(text), "user_id", "business_id", "stars", "date")
    return [(_id(user), _id(item), _rating(rating), parse_date(date) * MICRO, "")]


def _cells(text: str, separator: str, number: int) -> list[str]:
    try:  # commas may stand inside quotes; the other separators never do
        cells = next(csv.reader([text])) if separator == "," else text.split(separator)
    except csv.Error as error:
        raise ValueError(f"not CSV ({error})") from None
    if len(cells) != number:
        raise ValueError(f"{len(cells)} fields instead of {number}")
    return cells


def _row(separator: str) -> Callable[[str], list[Interaction]]:
    def parse(text: str) -> list[Interaction]:
        user, item, rating, time = _cells(text, separator, 4)
        return [(_id(user), _id(item), _rating(rating), *_time(time))]

    return parse


def _sequence(text: str) -> list[Interaction]:
    user, *items = map(_id, text.split())
    if not items:
        raise ValueError(f"user {user!r} has no items")
    return [(user, item, 0.0, time * MICRO, "") for time, item in enumerate(items, start=1)]


def _title(item: Any, title: Any) -> Title:
    return _id(item), " ".join(_UNFIT.sub(" ", str(title or "")).split())


def _amazon_product(text: str) -> Title:
    record = _object(text, loose=True)
    (item,) = _values(record, "asin")
    return _title(item, record.get("title"))


def _yelp_business(text: str) -> Title:
    item, name = _values(_object(text), "business_id", "name")
    return _title(item, name)


def _movie(separator: str, number: int) -> Callable[[str], Title]:
    def parse(text: str) -> Title:
        item, title, *_ = _cells(text, separator, number)
        return _title(item, title)

    return parse


@dataclass(frozen=True)
class Format:
    """A kind of text file.

    Attributes:
        name (str): as users know it.
        fits (Callable): whether a file with this first line is of this kind.
        parse (Callable): what a line says; raises ValueError if it is malformed.
        header (bool): the first line names the columns.
        latin (bool): lines that are not UTF-8 are Latin-1.
    """

    name: str
    fits: Callable[[str], bool]
    parse: Callable[[str], Any]
    header: bool = False
    latin: bool = False


def _starts(text: str) -> Callable[[str], bool]:
    return lambda line: line.lstrip().startswith(text)


def _separated(separator: str, number: int) -> Callable[[str], bool]:
    return lambda line: line.count(separator) == number - 1


def _header(*names: str) -> Callable[[str], bool]:
    return lambda line: [cell.strip('" ') for cell in line.split(",")] == [*names]


def _ids_only(line: str) -> bool:
    return " " in line.strip() and not re.search(r"[\t,{\[]|::", line)


@dataclass(frozen=True)
class Source:
    """The files of one provider.

    Attributes:
        interactions, titles (tuple): their formats.
        positions (bool): a line is a whole user and times are positions; there are no ratings.
    """

    interactions: tuple[Format, ...]
    titles: tuple[Format, ...] = ()
    positions: bool = False


SOURCES = {
    "amazon": Source(
        (
            Format("reviews, a JSON object a line", _starts("{"), _amazon_review),
            Format("ratings 'user,item,rating,timestamp'", _separated(",", 4), _row(",")),
        ),
        (Format("metadata, an object a line", _starts("{"), _amazon_product),),
    ),
    "yelp": Source(
        (Format("reviews, a JSON object a line", _starts("{"), _yelp_review),),
        (Format("businesses, a JSON object a line", _starts("{"), _yelp_business),),
    ),
    "movielens": Source(
        (
            Format("ratings.dat", _separated("::", 4), _row("::")),
            Format(
                "ratings.csv",
                _header("userId", "movieId", "rating", "timestamp"),
                _row(","),
                header=True,
            ),
            Format("u.data", _separated("\t", 4), _row("\t")),
        ),
        (
            Format("movies.dat", _separated("::", 3), _movie("::", 3), latin=True),
            Format(
                "movies.csv", _header("movieId", "title", "genres"), _movie(",", 3), header=True
            ),
            Format("u.item", _separated("|", 24), _movie("|", 24), latin=True),
        ),
    ),
    "sequences": Source(
        (Format("lines 'user item item ...'", _ids_only, _sequence),), positions=True
    ),
}


class Reader:
    """Parsed lines of text files, plain or gzip.

    Attributes:
        malformed (int): lines that could not be read.
        shown (list): the first of them, with file, number and reason.

    Args:
        skip_malformed (bool): count lines that cannot be read instead of stopping at the first.
    """

    def __init__(self, skip_malformed: bool) -> None:
        self.skip, self.malformed, self.shown = skip_malformed, 0, list[str]()
        self._place: tuple[Path, int, bytes] = (Path(), 0, b"")

    def refuse(self, reason: object) -> None:
        """The line at hand is malformed.

        Raises:
            UserError: unless malformed lines are skipped.
        """
        path, number, line = self._place
        message = f"{path}, line {number}: {reason}: {_excerpt(line)}"
        if not self.skip:
            raise UserError(f"{message}. --skip_malformed counts such lines and goes on")
        self.malformed += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(message)

    def records(self, formats: Sequence[Format], paths: Sequence[Path]) -> Iterator[Any]:
        """What each line says, in order; blank ones are passed over.

        Args:
            formats (Sequence): what a file may be; its first line decides.
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
                yield from self._file(formats, path, bar)

    def _file(self, formats: Sequence[Format], path: Path, bar: Any) -> Iterator[Any]:
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
                        if form.header:
                            continue
                    self._place = path, number, line
                    try:
                        record = form.parse(_decode(line, form).rstrip("\r\n"))
                    except ValueError as error:
                        self.refuse(error)
                        continue
                    yield record
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is damaged after line {number}: {error}") from error
        bar.update(before + path.stat().st_size - bar.n)


def _format(formats: Sequence[Format], path: Path, line: bytes) -> Format:
    text = line.decode(errors="replace").rstrip("\r\n")
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
