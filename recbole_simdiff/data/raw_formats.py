"""Raw downloads line by line: what each source writes and how it is read."""

import ast
import csv
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from recbole_simdiff.data.times import DATES, MICRO, parse_date, parse_time

Array = NDArray[Any]

# User, item, rating, time in microseconds, and the unit it was given in ("" for a position).
Interaction = tuple[str, str, float, int, str]

Title = tuple[str, str]  # item, title

# Fields of a review: user, item, rating, time. In 2023 variants of a product share a parent_asin,
# which the metadata and the benchmark's own files are about.
_AMAZON_2014 = ("reviewerID", "asin", "overall", "unixReviewTime")

_AMAZON_2023 = ("user_id", "parent_asin", "rating", "timestamp")

# What would break a line of a tab-separated UTF-8 file.
_UNFIT = re.compile("[\t\n\r\0\ud800-\udfff]")


def parse_id(value: Any) -> str:
    """An id as text.

    Raises:
        ValueError: if it is empty, or no text and no whole number.
    """
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text.strip() or _UNFIT.search(text):
        raise ValueError(f"{value!r} is not an id")
    return text


def parse_rating(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError: if it is none.
    """
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"rating {value!r} is not a number")
    return number


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
    record = _object(text, loose=True)
    names = _AMAZON_2023 if "user_id" in record else _AMAZON_2014
    user, item, rating, time = _values(record, *names)
    return [(parse_id(user), parse_id(item), parse_rating(rating), *parse_time(time))]


def _yelp_review(text: str) -> list[Interaction]:
    user, item, rating, date = _values(_object(text), "user_id", "business_id", "stars", "date")
    return [(parse_id(user), parse_id(item), parse_rating(rating), parse_date(date) * MICRO, DATES)]


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
        return [(parse_id(user), parse_id(item), parse_rating(rating), *parse_time(time))]

    return parse


def _sequence(text: str) -> list[Interaction]:
    user, *items = map(parse_id, text.split())
    if not items:
        raise ValueError(f"user {user!r} has no items")
    return [(user, item, 0.0, time * MICRO, "") for time, item in enumerate(items, start=1)]


def _title(item: Any, title: Any) -> Title:
    return parse_id(item), " ".join(_UNFIT.sub(" ", str(title or "")).split())


def _amazon_product(text: str) -> Title:
    record = _object(text, loose=True)
    (item,) = _values(record, "parent_asin" if "parent_asin" in record else "asin")
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
        interactions (tuple | TableColumns): formats of the interactions, or columns of a table.
        titles (tuple): formats of the titles.
        positions (bool): a line is a whole user and times are positions.
        with_ratings (bool): interactions have ratings.
    """

    interactions: Any
    titles: tuple[Format, ...] = ()
    positions: bool = False
    with_ratings: bool = True


SOURCES = {
    "amazon": Source(
        (
            Format("reviews, a JSON object a line", _starts("{"), _amazon_review),
            Format(
                "ratings 'user_id,parent_asin,rating,timestamp' with that first line",
                _header(*_AMAZON_2023),
                _row(","),
                header=True,
            ),
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
        (Format("lines 'user item item ...'", _ids_only, _sequence),),
        positions=True,
        with_ratings=False,
    ),
}
