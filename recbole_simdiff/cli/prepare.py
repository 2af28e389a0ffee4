"""The command that converts raw downloads to atomic files."""

import argparse
import sys
from typing import Any

from recbole_simdiff.config.checks import separator
from recbole_simdiff.data import interactions, prepare, raw_formats
from recbole_simdiff.data.tables import TableColumns
from recbole_simdiff.errors import UserError


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``prepare``."""
    parser.description = (
        "Files are plain or .gz; their first line shows which format of the source they have. "
        "Repeated interactions are kept. NAME.manifest.json says what a file was made from."
    )
    sources = (*raw_formats.SOURCES, prepare.TABLE)
    parser.add_argument("--source", required=True, choices=sources)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="amazon: reviews (JSON lines) or ratings (CSV) of 2014 or 2023; yelp: reviews; "
        "movielens: ratings.dat, ratings.csv, u.data; sequences: a line 'user item item ...' for "
        "each user; table: any text file of columns, or Parquet, with --columns",
    )
    _add_table_arguments(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR/NAME",
        help="makes DIR/NAME/NAME.inter, for --dataset=NAME --data_path=DIR",
    )
    parser.add_argument(
        "--titles",
        metavar="FILE",
        help="also makes NAME.item. amazon: metadata; yelp: businesses; movielens: movies.dat, "
        "movies.csv, u.item",
    )
    parser.add_argument(
        "--k_core",
        type=int,
        default=5,
        metavar="K",
        help="remove users and items with fewer interactions, repeatedly until none has fewer "
        "(default 5, as in the papers; 0: no filter)",
    )
    date = "YYYY-MM-DD[ HH:MM:SS]"
    parser.add_argument("--from", dest="start", metavar="DATE", help=f"first date, UTC: {date}")
    parser.add_argument(
        "--to", dest="end", metavar="DATE", help="last date, the whole day included"
    )
    parser.add_argument(
        "--min_rating",
        type=float,
        metavar="R",
        help="minimum rating (default none, as in the papers)",
    )
    parser.add_argument(
        "--skip_malformed", action="store_true", help="skip and count lines that cannot be read"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``--source=table``."""
    table = parser.add_argument_group("tables")
    table.add_argument(
        "--columns",
        metavar="USER,ITEM,TIME[,RATING]",
        help="names from the first line, or numbers from 1",
    )
    table.add_argument(
        "--separator", help="between columns (default: recognised; '\\t' is a tab)", metavar="TEXT"
    )
    table.add_argument(
        "--time_format",
        metavar="FORMAT",
        help="of dates as text, as in %%d.%%m.%%Y; not needed for numbers and for ISO 8601",
    )


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Convert raw downloads to atomic files."""
    if overrides:
        raise UserError(f"prepare does not know --{next(iter(overrides))}; see prepare --help")
    done = prepare.prepare(
        namespace.source,
        namespace.input,
        namespace.output,
        table=_table(namespace),
        k=namespace.k_core,
        selection=interactions.select(namespace.start, namespace.end, namespace.min_rating),
        titles=namespace.titles,
        skip_malformed=namespace.skip_malformed,
        overwrite=namespace.overwrite,
    )
    if done.malformed:
        shown = "\n  ".join(done.shown)
        print(
            f"{done.malformed:,} malformed lines skipped, for example\n  {shown}", file=sys.stderr
        )
    print(done.report())
    return 0


def _table(namespace: argparse.Namespace) -> TableColumns | None:
    """The columns of a table; None for another source.

    Raises:
        UserError: for impossible columns or separators, and for options that have no effect.
    """
    options = {key: vars(namespace)[key] for key in ("columns", "separator", "time_format")}
    given = {key: value for key, value in options.items() if value is not None}
    if namespace.columns is None:
        if given and namespace.source != prepare.TABLE:
            raise UserError(f"--{next(iter(given))}: only --source=table has it")
        return None
    if "separator" in given:
        given["separator"] = separator("separator", given["separator"])
    return TableColumns.of(**given)
