"""Interactions as columns: which are kept while reading, the k-core, order of time."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recbole_simdiff.data.raw_formats import Array, Interaction, Source
from recbole_simdiff.data.reader import Reader
from recbole_simdiff.data.statistics import Statistics
from recbole_simdiff.data.times import LAST_SECOND, MICRO, parse_date
from recbole_simdiff.errors import UserError


class Selection(NamedTuple):
    """Which interactions are kept while reading; seconds since 1970, both ends included."""

    start: float = -math.inf
    end: float = math.inf
    min_rating: float = -math.inf

    def holds(self, interaction: Interaction) -> bool:
        """Whether the interaction is one of them."""
        _, _, rating, time, _ = interaction
        return self.start <= time // MICRO <= self.end and rating >= self.min_rating


EVERYTHING = Selection()


def select(start: str | None, end: str | None, min_rating: float | None) -> Selection:
    """A window of time and a minimum rating, as typed by a user.

    Args:
        start, end (str | None): first and last date, YYYY-MM-DD[ HH:MM:SS], in UTC; a last date
            without a time of day includes the whole day.
        min_rating (float | None): smallest rating.

    Raises:
        UserError: for what is not a date or not a number, and for an empty window.
    """
    first = -math.inf if start is None else _option_date("from", start)
    last = math.inf if end is None else _option_date("to", end)
    if end is not None and len(end) == len("YYYY-MM-DD"):
        last += LAST_SECOND
    if first > last:
        raise UserError(f"--from={start} is after --to={end}")
    lowest = -math.inf if min_rating is None else min_rating
    if math.isnan(lowest):
        raise UserError("--min_rating=nan must be a number")
    return Selection(first, last, lowest)


def _option_date(option: str, text: str) -> int:
    try:
        return parse_date(text)
    except ValueError as error:
        raise UserError(f"--{option}={text}: {error}") from None


class Table:
    """Interactions as columns; users and items are codes in the order of their first appearance.

    Attributes:
        users, items (dict): id -> code.
        n_read (int): interactions in the files, selected or not.
        units (Counter): of time -> how many of them were given in it.
    """

    def __init__(self) -> None:
        self.users, self.items = dict[str, int](), dict[str, int]()
        self.units = Counter[str]()
        self.n_read = 0
        self._columns = array("i"), array("i"), array("d"), array("q")

    def __len__(self) -> int:
        return len(self._columns[0])

    def read(
        self, reader: Reader, source: Source, paths: Sequence[Path], selection: Selection
    ) -> None:
        """Append the selected interactions of some files."""
        users, items = self.users, self.items
        user, item, rating, time = self._columns
        for line in reader.records(source.interactions, paths):
            if source.positions and line[0][0] in users:
                reader.refuse(f"user {line[0][0]!r} has a line already")
                continue
            self.n_read += len(line)
            self.units.update(interaction[4] for interaction in line if interaction[4])
            for interaction in filter(selection.holds, line):
                user.append(users.setdefault(interaction[0], len(users)))
                item.append(items.setdefault(interaction[1], len(items)))
                rating.append(interaction[2])
                time.append(interaction[3])

    def in_order(self, k: int) -> "Columns":
        """The k-core, sorted by user and time; interactions of equal time stay in their order."""
        user, item, rating, time = self._columns
        columns = Columns(
            np.frombuffer(user, np.int32),
            np.frombuffer(item, np.int32),
            np.frombuffer(rating, np.float64),
            np.frombuffer(time, np.int64),
        )
        columns = columns.take(k_core(columns.user, columns.item, k))
        return columns.take(np.lexsort((columns.time, columns.user)))


class Columns(NamedTuple):
    """Codes of users, codes of items, ratings, and times in microseconds, [n] each."""

    user: Array
    item: Array
    rating: Array
    time: Array

    def take(self, rows: Array) -> "Columns":
        """The interactions at some positions, [rows]."""
        return Columns(*(column[rows] for column in self))

    @property
    def statistics(self) -> Statistics:
        """Counts of the interactions, which must be in order."""
        n = len(self.user)
        users, items = len(np.unique(self.user)), len(np.unique(self.item))
        ties = (self.user[1:] == self.user[:-1]) & (self.time[1:] == self.time[:-1])
        return Statistics(users, items, n, n - self.n_repeated, int(ties.sum()))

    @property
    def n_repeated(self) -> int:
        """Interactions whose user had the item before."""
        pairs = self.user.astype(np.int64) << 32 | self.item
        return len(pairs) - len(np.unique(pairs))


def k_core(user: Array, item: Array, k: int) -> Array:
    """The interactions left when all users and items with fewer than ``k`` of them are removed.

    Removing one may leave another with too few, so it is repeated until nothing changes.

    Args:
        user (array): codes from 0, [n].
        item (array): codes from 0, [n].
        k (int): minimum number of interactions; up to 1 keeps everything.

    Returns:
        array: positions, ascending, [n left].
    """
    left = np.arange(len(user))
    while True:
        enough = (np.bincount(user) >= k)[user] & (np.bincount(item) >= k)[item]
        if enough.all():
            return left
        left, user, item = left[enough], user[enough], item[enough]
