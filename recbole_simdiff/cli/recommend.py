"""The command that recommends."""

import argparse
import csv
import hashlib
import io
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.cli.histories import NamedHistory, read_histories, read_ids, split_ids
from recbole_simdiff.cli.messages import printable
from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.errors import UserError
from recbole_simdiff.serving import batch
from recbole_simdiff.serving import recommender as inference
from recbole_simdiff.serving.ranking import SEARCHES
from recbole_simdiff.version import __version__


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``recommend``."""
    parser.description = (
        "Histories are item ids as in the data set, oldest first. --input reads one for each line: "
        '\'12,7,99\' (CSV), \'["12", "7"]\' or \'{"user": "u1", "items": ["12"]}\' (JSON); such an '
        'object may have "exclude" and "allowed", lists of ids for this history, too. With '
        "--output the answers to each 10,000 histories are a file, and the same command continues "
        "where it was stopped."
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
    parser.add_argument(
        "--output", metavar="DIR", help="write parts of JSON lines or CSV to this folder"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes that write (default 1)"
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
    namespace: argparse.Namespace, recommender: inference.Recommender, quiet: bool = False
) -> tuple[list[str], list[str] | None]:
    """The ids of ``--exclude`` and ``--allowed``; unless ``quiet``, says how many are unknown.

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
        if unknown and not quiet:
            text = f"--{option}: {unknown} of {len(ids)} ids are not in the training data"
            print(text, file=sys.stderr)
    return excluded, allowed


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Recommend items to users or histories."""
    if overrides:
        raise UserError(f"recommend does not know --{next(iter(overrides))}; see recommend --help")
    _check_output(namespace)
    loaded = _weights(namespace) if namespace.output else ""
    recommend = _Recommend(namespace)
    requests = _requests(namespace, recommend.recommender)
    n_requests, n_unanswered = (
        _write(namespace, recommend, requests, loaded)
        if namespace.output
        else _print(namespace, recommend, requests)
    )
    if not n_requests:
        raise UserError(
            f"nothing to recommend to: {namespace.input} has no history"
            if namespace.input
            else "nothing to recommend to: give --users, --all_users, --history or --input"
        )
    if n_requests == n_unanswered and not namespace.fallback:
        raise UserError("no history has an item of the training data")
    return 0


def _check_output(namespace: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UserError: naming them.
    """
    if namespace.jobs < 1:
        raise UserError(f"--jobs={namespace.jobs} must be at least 1")
    if namespace.output and namespace.format == "table":
        raise UserError("--output needs --format=json or --format=csv")
    if namespace.jobs > 1 and not namespace.output:
        raise UserError(f"--jobs={namespace.jobs} needs --output: each process writes files")


class _Recommend:
    """A checkpoint and the options of the command, which answer blocks of histories.

    Args:
        namespace (Namespace): the options.
        quiet (bool): what the filters do not know has been said before.
    """

    def __init__(self, namespace: argparse.Namespace, quiet: bool = False) -> None:
        self.namespace = namespace
        self.recommender = inference.load(
            namespace.checkpoint,
            namespace.use_gpu == "true",
            namespace.model_file,
            namespace.search,
        )
        self.filters = read_filters(namespace, self.recommender, quiet)

    def answers(self, requests: Sequence[NamedHistory]) -> list[inference.Recommendation]:
        """An answer to each history."""
        namespace = self.namespace
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown items are reported for each history
            return self.recommender.recommend(
                [inference.Request(one.items, one.exclude, one.allowed) for one in requests],
                namespace.k,
                namespace.seen == "drop",
                *self.filters,
                namespace.fallback,
            )

    def part(self, requests: Sequence[NamedHistory]) -> batch.Answers:
        """The answers to a block as a file holds them."""
        answers, text = self.answers(requests), io.StringIO()
        if self.namespace.format == "csv":
            _write_heads(text)
        write_answers(text, self.namespace.format, requests, answers, self.recommender)
        return batch.Answers(text.getvalue(), _n_unanswered(requests, answers))


def _part_writer(namespace: argparse.Namespace, weights: str) -> batch.Answer:
    """What answers the blocks of one process, by the weights that the command was started with."""
    recommend = _Recommend(namespace, quiet=True)
    current = _weights(namespace)

    def part(requests: Sequence[NamedHistory]) -> batch.Answers:
        _check_same(namespace, weights, current)
        return recommend.part(requests)

    return part


def _weights(namespace: argparse.Namespace) -> str:
    """A checksum of the checkpoint as it is now."""
    with open(checkpoint.resolve(namespace.checkpoint, BEST), "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _check_same(namespace: argparse.Namespace, before: str, now: str) -> None:
    """Refuse a checkpoint that was replaced while it was read.

    Raises:
        UserError: if it was.
    """
    if before != now:
        raise UserError(
            f"--checkpoint={namespace.checkpoint} was replaced while it was read; give another "
            "--output, or delete it, and start again"
        )


def _n_unanswered(
    requests: Sequence[NamedHistory], answers: Sequence[inference.Recommendation]
) -> int:
    """Histories without a known item."""
    pairs = zip(requests, answers, strict=True)
    return sum(len(answer.unknown) == len(request.items) for request, answer in pairs)


def _write(
    namespace: argparse.Namespace,
    recommend: _Recommend,
    requests: Iterator[NamedHistory],
    loaded: str,
) -> tuple[int, int]:
    """Write the answers to files; numbers of histories and of those without a known item.

    ``loaded`` is the checksum of the checkpoint from before it was read.
    """
    _check_same(namespace, loaded, _weights(namespace))
    settings = {key: vars(namespace)[key] for key in ("k", "seen", "search", "fallback", "format")}
    settings["checkpoint"] = loaded
    filters = hashlib.blake2b(json.dumps(recommend.filters).encode(), digest_size=16)
    own = recommend.recommender.config.own
    settings |= {"filters": filters.hexdigest(), "version": __version__}
    settings |= {"code of the model": own.checksum} if own else {}
    # In this process the checkpoint is there already.
    others = partial(_part_writer, namespace, loaded)
    begin = (lambda: recommend.part) if namespace.jobs == 1 else others
    folder = Path(namespace.output)
    suffix = {"json": "jsonl", "csv": "csv"}[namespace.format]
    totals = batch.write_parts(requests, begin, folder, settings, suffix, namespace.jobs)
    if totals.requests:
        print(
            f"{folder}: {totals.requests:,} histories in {totals.parts} parts, {totals.kept} of "
            f"them from before; {totals.unanswered:,} histories have no known item"
        )
    return totals.requests, totals.unanswered


def _print(
    namespace: argparse.Namespace, recommend: _Recommend, requests: Iterator[NamedHistory]
) -> tuple[int, int]:
    """Print the answers; numbers of histories and of those without a known item."""
    n_requests = n_unanswered = 0
    for block in batch.blocks(requests):
        answers = recommend.answers(block)
        for request, answer in zip(block, answers, strict=True):
            if note := _note(request, answer, recommend.recommender, namespace.fallback):
                print(printable(f"{request.name}: {note}"), file=sys.stderr)
        n_requests += len(block)
        n_unanswered += _n_unanswered(block, answers)
        # Of a few histories none of which is known, nothing is printed but the error.
        if n_unanswered < n_requests or namespace.fallback or len(block) == batch.BLOCK:
            if namespace.format == "csv" and n_requests == len(block):
                _write_heads(sys.stdout)
            write_answers(sys.stdout, namespace.format, block, answers, recommend.recommender)
    return n_requests, n_unanswered


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


def _write_heads(file: TextIO) -> None:
    csv.writer(file, lineterminator="\n").writerow(["history", "rank", "item", "score"])


def write_answers(
    file: TextIO,
    output_format: str,
    requests: Sequence[NamedHistory],
    answers: Sequence[inference.Recommendation],
    recommender: inference.Recommender,
) -> None:
    """Write answers as ``table``, ``json`` or ``csv``."""
    writer = csv.writer(file, lineterminator="\n")
    for request, answer in zip(requests, answers, strict=True):
        ranked = list(enumerate(zip(answer.items, answer.scores, strict=True), start=1))
        if output_format == "json":
            print(json.dumps({"history": request.name, **answer._asdict()}), file=file)
        elif output_format == "csv":
            name = request.name.encode("utf-8", "backslashreplace").decode()  # half a character
            writer.writerows([name, rank, i, f"{s:.6f}"] for rank, (i, s) in ranked)
        else:
            print(printable(request.name), file=file)
            for rank, (item, score) in ranked:
                title = printable(recommender.title(item))
                print(f"  {rank:>3}  {score:9.4f}  {title}", file=file)


def _requests(
    namespace: argparse.Namespace, recommender: inference.Recommender
) -> Iterator[NamedHistory]:
    for user in recommender.users if namespace.all_users else split_ids(namespace.users or ""):
        yield NamedHistory(user, recommender.history(user))
    for number, text in enumerate(namespace.history or (), start=1):
        yield NamedHistory(f"history {number}", split_ids(text))
    if namespace.input:
        yield from read_histories(namespace.input, "input")
