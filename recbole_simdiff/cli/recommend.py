"""The command that recommends."""

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from recbole_simdiff.cli.histories import NamedHistory, read_histories, read_ids, split_ids
from recbole_simdiff.cli.messages import printable
from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.errors import UserError
from recbole_simdiff.serving import recommender as inference
from recbole_simdiff.serving.ranking import SEARCHES


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``recommend``."""
    parser.description = (
        "Histories are item ids as in the data set, oldest first. --input reads one for each line: "
        '\'12,7,99\' (CSV), \'["12", "7"]\' or \'{"user": "u1", "items": ["12"]}\' (JSON); such an '
        'object may have "exclude" and "allowed", lists of ids for this history, too.'
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder or file")
    add_model_file(parser)
    users = parser.add_mutually_exclusive_group()
    users.add_argument("--users", metavar="U,U", help="users of the training data")
    users.add_argument("--all_users", action="store_true", help="all of them")
    parser.add_argument(
        "--history", action="append", metavar="I,I", help="a history of item ids; may be repeated"
    )
    parser.add_argument(
        "--input", metavar="FILE", help="file of histories, or - for standard input"
    )
    parser.add_argument("--k", type=int, default=10, help="items per history (default 10)")
    parser.add_argument(
        "--seen",
        choices=("drop", "keep"),
        default="drop",
        help="items of the history (default drop)",
    )
    add_filters(parser)
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="output (default table)"
    )
    parser.add_argument("--use_gpu", choices=("true", "false"), default="true")


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add what holds for all histories: the search, which items it may find, the fallback."""
    parser.add_argument(
        "--search",
        choices=SEARCHES,
        default="exact",
        help="exact (default), or approximate, for large tables of items; needs the extra ann",
    )
    parser.add_argument(
        "--exclude", metavar="FILE", help="item ids that are recommended to nobody, one a line"
    )
    parser.add_argument(
        "--allowed",
        metavar="FILE",
        help="item ids of which alone recommendations are chosen, one a line",
    )
    parser.add_argument(
        "--fallback",
        choices=inference.FALLBACKS,
        help="what a history without a known item gets (default nothing)",
    )


def read_filters(
    namespace: argparse.Namespace, recommender: inference.Recommender
) -> tuple[list[str], list[str] | None]:
    """The ids of ``--exclude`` and ``--allowed``.

    Raises:
        UserError: if a file cannot be read, or none of its ids is known.
    """
    excluded = read_ids(namespace.exclude) if namespace.exclude else []
    allowed = read_ids(namespace.allowed) if namespace.allowed else None
    for option, ids in (("exclude", excluded), ("allowed", allowed)):
        if not ids:
            continue
        unknown = len(ids) - len(recommender.numbers(ids))
        if unknown == len(ids):
            raise UserError(
                f"--{option}={vars(namespace)[option]}: no id of it is in the training data; it "
                f"must have ids such as {recommender.item_ids[1]}, one a line"
            )
        if unknown:
            text = f"--{option}: {unknown} of {len(ids)} ids are not in the training data"
            print(text, file=sys.stderr)
    return excluded, allowed


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Recommend items to users or histories."""
    if overrides:
        raise UserError(f"recommend does not know --{next(iter(overrides))}; see recommend --help")
    recommender = inference.load(
        namespace.checkpoint,
        namespace.use_gpu == "true",
        namespace.model_file,
        namespace.search,
    )
    excluded, allowed = read_filters(namespace, recommender)
    requests = list(_requests(namespace, recommender))
    if not requests:
        raise UserError(
            f"nothing to recommend to: {namespace.input} has no history"
            if namespace.input
            else "nothing to recommend to: give --users, --all_users, --history or --input"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unknown items are reported for each history below
        answers = recommender.recommend(
            [inference.Request(one.items, one.exclude, one.allowed) for one in requests],
            namespace.k,
            namespace.seen == "drop",
            excluded,
            allowed,
            namespace.fallback,
        )
    for request, answer in zip(requests, answers, strict=True):
        if note := _note(request, answer, recommender, namespace.fallback):
            print(printable(f"{request.name}: {note}"), file=sys.stderr)
    all_unknown = all(
        len(a.unknown) == len(r.items) for r, a in zip(requests, answers, strict=True)
    )
    if all_unknown and not namespace.fallback:
        raise UserError("no history has an item of the training data")
    _print(namespace.format, requests, answers, recommender)
    return 0


def _note(
    request: NamedHistory,
    answer: inference.Recommendation,
    recommender: inference.Recommender,
    fallback: str | None,
) -> str:
    """A note about an answer: unknown items, or no item to rank; empty if there is none."""
    unknown, shown = len(answer.unknown), ", ".join(answer.unknown[:10])
    if unknown == len(request.items):
        given = f"the {fallback} items" if fallback else "no recommendation"
        return (
            f"no known item, {given}: {shown or 'it is empty'} (items are separated "
            f"by commas: {','.join(recommender.item_ids[1:4])})"
        )
    if not answer.items:
        if set(recommender.item_ids[1:]) <= set(request.items):
            return "all items have been seen; --seen=keep also ranks seen items"
        return "seen items and filters leave nothing to recommend"
    return f"{unknown} unknown items left out: {shown}" if unknown else ""


def _print(
    output_format: str,
    requests: Sequence[NamedHistory],
    answers: Sequence[inference.Recommendation],
    recommender: inference.Recommender,
) -> None:
    """Print the answers to standard output as ``table``, ``json`` or ``csv``."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if output_format == "csv":
        writer.writerow(["history", "rank", "item", "score"])
    for request, answer in zip(requests, answers, strict=True):
        ranked = list(enumerate(zip(answer.items, answer.scores, strict=True), start=1))
        if output_format == "json":
            print(json.dumps({"history": request.name, **answer._asdict()}))
        elif output_format == "csv":
            writer.writerows([request.name, rank, i, f"{s:.6f}"] for rank, (i, s) in ranked)
        else:
            print(printable(request.name))
            for rank, (item, score) in ranked:
                print(f"  {rank:>3}  {score:9.4f}  {printable(recommender.title(item))}")


def _requests(
    namespace: argparse.Namespace, recommender: inference.Recommender
) -> Iterator[NamedHistory]:
    for user in recommender.users if namespace.all_users else split_ids(namespace.users or ""):
        yield NamedHistory(user, recommender.history(user))
    for number, text in enumerate(namespace.history or (), start=1):
        yield NamedHistory(f"history {number}", split_ids(text))
    if namespace.input:
        yield from read_histories(namespace.input, "input")
