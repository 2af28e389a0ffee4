"""Raw downloads to RecBole atomic files, in one pass and bounded memory.

    lines        each is parsed or reported with its file and number
    selection    a window of time and a minimum rating, while reading
    columns      what is kept of an interaction is two codes, a rating and a time; ids are kept once
    k-core       users and items with fewer than k interactions are removed, until none is left
    times        dates, or seconds, milliseconds, microseconds or nanoseconds since 1970, which
                 their size tells; exact to the microsecond; written as seconds
    order        users as they first appear, each one's interactions by time; interactions of equal
                 time stay in the order of the files, and rounding times to float32 moves none
    manifest     sources, checksums, options and statistics, in a JSON file beside the others

Repeated (user, item) pairs stay, as in S3-Rec's preparation code; ``rm_dup_inter`` in the settings
of a data set drops them when it is read. That pairs are dropped later changes no result: the k-core
without them is part of the k-core with them.
"""

import csv
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.interactions import EVERYTHING, Columns, Selection, Table
from recbole_simdiff.data.manifest import described, write_files
from recbole_simdiff.data.raw_formats import SOURCES, Source, Title
from recbole_simdiff.data.reader import Reader
from recbole_simdiff.data.statistics import Statistics, published
from recbole_simdiff.data.tables import TableColumns
from recbole_simdiff.data.times import DATES, MICRO
from recbole_simdiff.errors import UserError
from recbole_simdiff.version import __version__

TABLE = "table"  # the source whose columns the user names


@dataclass(frozen=True)
class Prepared:
    """What was written, and from what.

    Attributes:
        path (Path): the ``.inter`` file.
        statistics (Statistics): of that file.
        n_read, n_selected (int): interactions in the files; those in the window with the rating.
        n_repeated (int): written interactions whose user had the item before.
        n_titles (int | None): titles in the ``.item`` file; None without one.
        hint (str): arguments that train on it.
        malformed (int): lines that were skipped.
        shown (tuple): the first of them.
        units (Mapping): of time -> how many of the interactions read were given in it.
        span (tuple): first and last time written, in seconds since 1970.
        formats (tuple): what each file was read as; of tables only.
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
    span: tuple[int, int] = (0, 0)
    formats: tuple[str, ...] = ()

    def report(self) -> str:
        """Counts, and the published statistics beside those of the file."""
        lines = [
            f"{self.n_read:,} interactions read, {self.n_selected:,} selected, "
            f"{self.statistics.actions:,} left by the k-core",
            f"{self.path.stem}: {self.statistics}",
        ]
        if self.units:
            first, last = (np.datetime64(second, "s") for second in self.span)
            lines[1:1] = [*self.formats, f"{_units(self.units)}: {first} to {last}, UTC"]
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


def _units(units: Mapping[str, int]) -> str:
    """Which units of time were recognised."""
    parts = [f"{unit} ({n:,})" if len(units) > 1 else unit for unit, n in units.items()]
    written = "" if [*units] == ["seconds"] else ", written as seconds"
    since = "" if DATES in units else " since 1970"
    return f"times taken for {' and '.join(parts)}{since}{written}{'' if since else ' since 1970'}"


class Names(NamedTuple):
    """Names of the columns that the settings of the data set expect."""

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
    """Refuse a folder that cannot be made or written to; nothing is left behind."""
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
    frame.to_csv(
        path,
        sep="\t",
        index=False,
        quoting=csv.QUOTE_NONE,
        lineterminator="\n",
        chunksize=5_000,  # rows that are text at once
    )


def _source(name: str, table: TableColumns | None) -> Source:
    """The files of a source; a table's columns come from the user.

    Raises:
        UserError: if a table has no columns, or another source has some.
    """
    if (name == TABLE) != (table is not None):
        raise UserError(
            "--source=table needs --columns=user,item,time, names or numbers of its columns"
            if table is None
            else f"--columns: --source={name} has columns of its own; --source=table reads others"
        )
    return SOURCES[name] if table is None else Source(table, with_ratings=table.has_ratings)


def _check_options(
    source: str, kind: Source, k: int, selection: Selection, titles: str | Path | None
) -> None:
    """Refuse options that a source cannot have."""
    if k < 0:
        raise UserError(f"--k_core={k} must be at least 0")
    if kind.positions and selection != EVERYTHING:
        raise UserError(
            f"--from, --to, --min_rating: --source={source} has no dates and no ratings"
        )
    if not kind.with_ratings and selection.min_rating > -math.inf:
        raise UserError("--min_rating needs a fourth name in --columns, that of the ratings")
    if titles is not None and not kind.titles:
        raise UserError(f"--titles={titles}: --source={source} has no titles")


def _core(table: Table, k: int, malformed: Sequence[str]) -> Columns:
    """The k-core in order; an empty one is refused, with the malformed lines shown."""
    if not len(table):
        lines = "".join(f"\n  {line}" for line in malformed)
        units = f"; {_units(table.units)}" if table.units else ""
        raise UserError(f"none of {table.n_read:,} interactions is selected{units}{lines}")
    columns = table.in_order(k)
    if not len(columns.user):
        raise UserError(f"--k_core={k} leaves none of {len(table):,} interactions")
    return columns


def prepare(
    source: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    table: TableColumns | None = None,
    k: int = 5,
    selection: Selection = EVERYTHING,
    titles: str | Path | None = None,
    skip_malformed: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """Write ``output/<name>.inter``, ``.item`` if there are titles, and ``.manifest.json``.

    <name> is that of the folder.

    Args:
        source (str): a key of ``SOURCES``, or ``TABLE``.
        inputs (Sequence): files of interactions, read in this order.
        output (str | Path): folder with the name of the data set.
        table (TableColumns | None): columns of the files of ``TABLE``.
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
    output, kind = Path(output), _source(source, table)
    _check_options(source, kind, k, selection, titles)
    inter_path, item_path = _places(output, titles is not None, overwrite)
    _check_writable(output)
    if titles is not None:  # before hours of reading interactions
        next(Reader(skip_malformed).records(kind.titles, [Path(titles)]), None)

    reader, events = Reader(skip_malformed), Table()
    events.read(reader, kind, [Path(path) for path in inputs], selection)
    columns = _core(events, k, reader.shown)

    settings = _settings(output.name)
    names = _names(settings)
    frames = {inter_path: _inter(events, columns, names, kind.with_ratings)}
    if titles is not None:
        title_rows = reader.records(kind.titles, [Path(titles)])
        frames[item_path] = _item(title_rows, events, columns, names)
    n_titles = len(frames[item_path]) if item_path in frames else None
    hint = _hint(output, settings, titles is not None)
    formats = tuple(reader.formats.values()) if table else ()
    done = _prepared(inter_path, events, columns, reader, formats, n_titles, hint)
    options = {"k_core": k, "skip_malformed": skip_malformed, **_as_json(selection)}
    options |= {} if table is None else asdict(table)
    write_files(frames, _write, _manifest(source, options, reader, done))
    return done


def _prepared(
    path: Path,
    events: Table,
    columns: Columns,
    reader: Reader,
    formats: tuple[str, ...],
    n_titles: int | None,
    hint: str,
) -> Prepared:
    """Path and counts of what is written."""
    return Prepared(
        path=path,
        statistics=columns.statistics,
        n_read=events.n_read,
        n_selected=len(events),
        n_repeated=columns.n_repeated,
        n_titles=n_titles,
        hint=hint,
        malformed=reader.malformed,
        shown=tuple(reader.shown),
        units=dict(events.units),
        span=(int(columns.time.min()) // MICRO, int(columns.time.max()) // MICRO),
        formats=formats,
    )


def _manifest(
    source: str, options: Mapping[str, Any], reader: Reader, done: Prepared
) -> dict[str, Any]:
    """What the manifest says: where the data come from, how they were made, and what they are."""
    sources = [described(path, form) for path, form in reader.formats.items()]
    return {"source": source, "options": dict(options), "sources": sources, **_counts(done)}


def _as_json(selection: Selection) -> dict[str, str | float | None]:
    """A selection with dates as text."""
    first, last = (
        None if math.isinf(second) else str(np.datetime64(int(second), "s"))
        for second in (selection.start, selection.end)
    )
    rating = None if math.isinf(selection.min_rating) else selection.min_rating
    return {"from": first, "to": last, "min_rating": rating}


def _counts(done: Prepared) -> dict[str, Any]:
    """What the manifest says of the result."""
    statistics = asdict(done.statistics)
    return {
        "made_by": f"recbole_simdiff {__version__}",
        "interactions": {
            "read": done.n_read,
            "selected": done.n_selected,
            "malformed": done.malformed,
        },
        "statistics": {**statistics, "repeated": done.n_repeated},
        "times": {"units": dict(done.units), "first": done.span[0], "last": done.span[1]},
    }
