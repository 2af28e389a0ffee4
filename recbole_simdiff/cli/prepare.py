"""The command that converts raw downloads to atomic files."""

import argparse
import sys
from typing import Any

from recbole_simdiff.data import prepare, raw_formats
from recbole_simdiff.errors import UserError


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``prepare``."""
    parser.description = (
        "Files are plain or .gz; their first line shows which format of the source they have. "
        "Repeated interactions are kept."
    )
    parser.add_argument("--source", required=True, choices=raw_formats.SOURCES)
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="amazon: reviews (JSON lines) or ratings (CSV) of 2014; yelp: reviews; movielens: "
        "ratings.dat, ratings.csv, u.data; sequences: a line 'user item item ...' for each user",
    )
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


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Convert raw downloads to atomic files."""
    if overrides:
        raise UserError(f"prepare does not know --{next(iter(overrides))}; see prepare --help")
    done = prepare.prepare(
        namespace.source,
        namespace.input,
        namespace.output,
        k=namespace.k_core,
        selection=prepare.select(namespace.start, namespace.end, namespace.min_rating),
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
