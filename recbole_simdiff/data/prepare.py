"""Raw downloads to RecBole atomic files, in one pass and bounded memory.

    lines        each is parsed or reported with its file and number
    selection    a window of time and a lowest rating, while reading
    columns      what is kept of an interaction is two codes, a rating and a time; ids are kept once
    k-core       users and items with fewer than k interactions go, until none is left
    times        seconds, milliseconds, microseconds or nanoseconds since 1970, told apart by their
                 size, exact to the microsecond; written as seconds
    order        users as they first appear, each one's interactions by time; interactions of equal
                 time stay in the order of the files, and rounding times to float32 moves none

Repeated (user, item) pairs stay, as in S3-Rec's preparation code; ``rm_dup_inter`` in the settings
of a data set drops them when it is read. That pairs are dropped later changes no result: the k-core
without them lies inside the k-core with them.
"""

import csv
import math
import shlex
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.raw_formats import (
    LAST_SECOND,
    MICRO,
    SOURCES,
    Array,
    Interaction,
    Reader,
    Source,
    Title,
    parse_date,
)
from recbole_simdiff.data.statistics import Statistics, published
from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_atomically


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
    """A window of time and a lowest rating, as typed by a user.

    Args:
        start, end (str | None): first and last date, YYYY-MM-DD[ HH:MM:SS], in UTC; a last date
            without a time of day is meant as a whole.
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
        units (Counter): of time -> how many of them were told in it.
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
        """Users, items and actions."""
        n = len(self.user)
        users, items = len(np.unique(self.user)), len(np.unique(self.item))
        return Statistics(users, items, n, n - self.n_repeated)

    @property
    def n_repeated(self) -> int:
        """Interactions whose user had the item before."""
        pairs = self.user.astype(np.int64) << 32 | self.item
        return len(pairs) - len(np.unique(pairs))


def k_core(user: Array, item: Array, k: int) -> Array:
    """The interactions left when every user and item with fewer than ``k`` of them is taken out.

    Taking out one may leave another with too few, so it is repeated until nothing changes.

    Args:
        user (array): codes from 0, [n].
        item (array): codes from 0, [n].
        k (int): least number of interactions; up to 1 keeps everything.

    Returns:
        array: positions, ascending, [n left].
    """
    left = np.arange(len(user))
    while True:
        enough = (np.bincount(user) >= k)[user] & (np.bincount(item) >= k)[item]
        if enough.all():
            return left
        left, user, item = left[enough], user[enough], item[enough]


@dataclass(frozen=True)
class Prepared:
    """What was written, and what it was made of.

    Attributes:
        path (Path): the ``.inter`` file.
        statistics (Statistics): of that file.
        n_read, n_selected (int): interactions in the files; those in the window with the rating.
        n_repeated (int): written interactions whose user had the item before.
        n_titles (int | None): titles in the ``.item`` file; None without one.
        hint (str): arguments that train on it.
        malformed (int): lines that were skipped.
        shown (tuple): the first of them.
        units (Mapping): of time -> how many of the interactions read were told in it.
    """

    path: Path
    statistics: Statistics
    n_read: int
    n_selected: int
    n_repeated: int
    n_titles: int | None
    hint: str
    malformed: int
    shown: tuple[str, ...]
    units: Mapping[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """Counts, and the published statistics beside those of the file."""
        lines = [
            f"{self.n_read:,} interactions read, {self.n_selected:,} selected, "
            f"{self.statistics.actions:,} left by the k-core",
            f"{self.path.stem}: {self.statistics}",
        ]
        if self.units:
            lines.insert(1, _told(self.units))
        for row in published(self.path.stem):
            verdict = "agrees with" if row.statistics == self.statistics else "differs from"
            lines.append(f"  {verdict} {row.source}: {row.statistics}; {row.note}")
        if self.n_repeated:
            lines.append(
                f"{self.n_repeated:,} repeat an item of their user; rm_dup_inter decides whether "
                "training sees them"
            )
        lines.append(str(self.path))
        if self.n_titles is not None:
            lines.append(f"{self.path.with_suffix('.item')}, {self.n_titles:,} titles")
        return "\n".join([*lines, f"train on it with {self.hint}"])


def _told(units: Mapping[str, int]) -> str:
    """Which units of time were taken."""
    parts = [f"{unit} ({n:,})" if len(units) > 1 else unit for unit, n in units.items()]
    written = "" if [*units] == ["seconds"] else ", written as seconds"
    return f"times taken for {' and '.join(parts)} since 1970{written}"


class Names(NamedTuple):
    """Of the columns, as the settings of the data set call them, so that they are found there."""

    user: str
    item: str
    rating: str
    time: str
    title: str


def _names(settings: Mapping[str, Any]) -> Names:
    return Names(
        settings.get("USER_ID_FIELD", "user_id"),
        settings.get("ITEM_ID_FIELD", "item_id"),
        settings.get("RATING_FIELD", "rating"),
        settings.get("TIME_FIELD", "timestamp"),
        settings.get("item_title_field", "title"),
    )


def _settings(name: str) -> dict[str, Any]:
    path = properties_dir() / "dataset" / f"{name}.yaml"
    return read_yaml(path) if path.is_file() else {}


def _hint(output: Path, settings: Mapping[str, Any], with_titles: bool) -> str:
    arguments = [f"--dataset={output.name}", f"--data_path={output.parent}"]
    names = _names(settings)
    if with_titles and "item_title_field" not in settings:
        arguments.append(f"--item_title_field={names.title}")
    return shlex.join(arguments)


def _places(output: Path, with_titles: bool, overwrite: bool) -> tuple[Path, Path]:
    """The ``.inter`` and the ``.item`` file to write."""
    name = output.name
    if name in ("", "..") or output.suffix in (".inter", ".item"):
        raise UserError(
            f"--output={output} must be a folder with the name of the data set: DIR/NAME makes "
            "DIR/NAME/NAME.inter"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file; it must be a folder, new or not")
    inter, item = output / f"{name}.inter", output / f"{name}.item"
    for path in (inter, item):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; --overwrite replaces it")
    if item.exists() and not with_titles:
        raise UserError(f"{item} belongs to the data to be replaced; give --titles or remove it")
    return inter, item


def _check_writable(output: Path) -> None:
    """Refuse a folder that nothing can be written to, or that cannot be made; leaves no trace."""
    try:
        place = next(path for path in (output, *output.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from None


def _inter(table: Table, columns: Columns, names: Names, with_ratings: bool) -> pd.DataFrame:
    users, items = np.array([*table.users], object), np.array([*table.items], object)
    exact = (columns.time % MICRO).any()  # 1 rather than 1.0 where all are whole seconds
    frame = {
        f"{names.user}:token": users[columns.user],
        f"{names.item}:token": items[columns.item],
        f"{names.rating}:float": columns.rating,
        f"{names.time}:float": columns.time / MICRO if exact else columns.time // MICRO,
    }
    if not with_ratings:
        del frame[f"{names.rating}:float"]
    return pd.DataFrame(frame)


def _item(titles: Iterator[Title], table: Table, columns: Columns, names: Names) -> pd.DataFrame:
    """Items of the k-core with their titles, where they have one; the first title counts."""
    kept = np.zeros(len(table.items), bool)
    kept[columns.item] = True
    kept_titles: dict[str, str] = {}
    for item, title in titles:
        if title and item in table.items and kept[table.items[item]]:
            kept_titles.setdefault(item, title)
    return pd.DataFrame(
        {f"{names.item}:token": [*kept_titles], f"{names.title}:token_seq": [*kept_titles.values()]}
    )


def _write(frame: pd.DataFrame, path: str) -> None:
    frame.to_csv(path, sep="\t", index=False, quoting=csv.QUOTE_NONE, lineterminator="\n")


def _write_both(
    inter: pd.DataFrame, inter_path: Path, item: pd.DataFrame | None, item_path: Path
) -> None:
    """Either both files are replaced or none; a failure may come while either is written."""

    def write(path: str) -> None:
        _write(inter, path)
        if item is not None:
            write_atomically(item_path, lambda name: _write(item, name))

    write_atomically(inter_path, write)


def _check_options(source: str, k: int, selection: Selection, titles: str | Path | None) -> None:
    """Refuse options that a source cannot have."""
    kind = SOURCES[source]
    if k < 0:
        raise UserError(f"--k_core={k} must be at least 0")
    if kind.positions and selection != EVERYTHING:
        raise UserError(
            f"--from, --to, --min_rating: --source={source} has no dates and no ratings"
        )
    if titles is not None and not kind.titles:
        raise UserError(f"--titles={titles}: --source={source} has no titles")


def _core(table: Table, k: int, malformed: Sequence[str]) -> Columns:
    """The k-core in order; an empty one is refused, with the malformed lines shown."""
    if not len(table):
        lines = "".join(f"\n  {line}" for line in malformed)
        told = f"; {_told(table.units)}" if table.units else ""
        raise UserError(f"none of {table.n_read:,} interactions is selected{told}{lines}")
    columns = table.in_order(k)
    if not len(columns.user):
        raise UserError(f"--k_core={k} leaves none of {len(table):,} interactions")
    return columns


def prepare(
    source: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    k: int = 5,
    selection: Selection = EVERYTHING,
    titles: str | Path | None = None,
    skip_malformed: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """Write ``output/<name>.inter``, and ``.item`` if there are titles; <name> is the folder's.

    Args:
        source (str): a key of ``SOURCES``.
        inputs (Sequence): files of interactions, read in this order.
        output (str | Path): folder with the name of the data set.
        k (int): of the k-core; 0 or 1 for none.
        selection (Selection): which interactions are kept.
        titles (str | Path | None): file of titles.
        skip_malformed (bool): count malformed lines instead of stopping at the first.
        overwrite (bool): replace existing files.

    Returns:
        Prepared: path and counts.

    Raises:
        UserError: for impossible options, files that cannot be read, or if nothing is left.
    """
    output, kind = Path(output), SOURCES[source]
    _check_options(source, k, selection, titles)
    inter_path, item_path = _places(output, titles is not None, overwrite)
    _check_writable(output)
    if titles is not None:  # before hours of reading interactions
        next(Reader(skip_malformed).records(kind.titles, [Path(titles)]), None)

    reader, table = Reader(skip_malformed), Table()
    table.read(reader, kind, [Path(path) for path in inputs], selection)
    columns = _core(table, k, reader.shown)

    settings = _settings(output.name)
    names = _names(settings)
    item = None
    if titles is not None:
        item = _item(reader.records(kind.titles, [Path(titles)]), table, columns, names)
    inter = _inter(table, columns, names, with_ratings=not kind.positions)
    _write_both(inter, inter_path, item, item_path)
    return Prepared(
        path=inter_path,
        statistics=columns.statistics,
        n_read=table.n_read,
        n_selected=len(table),
        n_repeated=columns.n_repeated,
        n_titles=None if item is None else len(item),
        hint=_hint(output, settings, titles is not None),
        malformed=reader.malformed,
        shown=tuple(reader.shown),
        units=dict(table.units),
    )
