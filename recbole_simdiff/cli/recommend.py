"""The command that recommends."""

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from recbole_simdiff.cli.messages import printable
from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.errors import UserError
from recbole_simdiff.serving import recommender as inference


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``recommend``."""
    parser.description = (
        "Histories are item ids as in the data set, oldest first. --input reads one for each line: "
        '\'12,7,99\' (CSV), \'["12", "7"]\' or \'{"user": "u1", "items": ["12"]}\' (JSON).'
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
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="output (default table)"
    )
    parser.add_argument("--use_gpu", choices=("true", "false"), default="true")


class _Request(NamedTuple):
    name: str
    items: list[str]


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Recommend items to users or histories."""
    if overrides:
        raise UserError(f"recommend does not know --{next(iter(overrides))}; see recommend --help")
    recommender = inference.load(
        namespace.checkpoint, namespace.use_gpu == "true", namespace.model_file
    )
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
            [request.items for request in requests], namespace.k, namespace.seen == "drop"
        )
    for request, answer in zip(requests, answers, strict=True):
        if note := _note(request, answer, recommender):
            print(printable(f"{request.name}: {note}"), file=sys.stderr)
    if all(len(a.unknown) == len(r.items) for r, a in zip(requests, answers, strict=True)):
        raise UserError("no history has an item of the training data")
    _print(namespace.format, requests, answers, recommender)
    return 0


def _note(
    request: _Request, answer: inference.Recommendation, recommender: inference.Recommender
) -> str:
    """A note about an answer: unknown items, or no item to rank; empty if there is none."""
    unknown, shown = len(answer.unknown), ", ".join(answer.unknown[:10])
    if unknown == len(request.items):
        return (
            f"no known item, no recommendation: {shown or 'it is empty'} (items are separated "
            f"by commas: {','.join(recommender.item_ids[1:4])})"
        )
    if not answer.items:
        return "all items have been seen; --seen=keep also ranks seen items"
    return f"{unknown} unknown items left out: {shown}" if unknown else ""


def _print(
    output_format: str,
    requests: Sequence[_Request],
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


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _requests(
    namespace: argparse.Namespace, recommender: inference.Recommender
) -> Iterator[_Request]:
    for user in recommender.users if namespace.all_users else _ids(namespace.users or ""):
        yield _Request(user, recommender.history(user))
    for number, text in enumerate(namespace.history or (), start=1):
        yield _Request(f"history {number}", _ids(text))
    try:
        if namespace.input == "-":
            if sys.__stdin__ is None:
                raise UserError("standard input is closed; give --input=FILE")
            yield from _read_histories(sys.stdin, "standard input")
        elif namespace.input:
            with open(namespace.input, encoding="utf-8-sig") as file:
                yield from _read_histories(file, namespace.input)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {namespace.input}: {error}") from None


def _read_histories(lines: Iterable[str], source: str) -> Iterator[_Request]:
    """One history for each line: CSV of item ids, a JSON list, or a JSON object with ``items``."""
    for number, line in enumerate(lines, start=1):
        line, name = line.removeprefix("\ufeff").strip(), f"line {number}"
        if not line:
            continue
        try:
            yield _request(line, name)
        except RecursionError:
            raise UserError(f"{source}, line {number}: nested too deep") from None
        except (ValueError, csv.Error) as error:
            raise UserError(f"{source}, line {number}: {error}") from None


def _request(line: str, name: str) -> _Request:
    """The history of a line.

    Raises:
        ValueError: if the line has neither of these forms.
    """
    if line[0] not in "[{":
        return _Request(name, [cell.strip() for cell in next(csv.reader([line])) if cell.strip()])
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except ValueError:  # Python refuses longer numbers
        raise ValueError("a number of more than 4300 digits; write ids as text") from None
    items = value.get("items") if isinstance(value, dict) else value
    if not isinstance(items, list) or any(isinstance(item, list | dict) for item in items):
        raise ValueError('expected item ids as [...] or {"items": [...]}')
    name = str(value.get("user", name)) if isinstance(value, dict) else name
    return _Request(name, [str(item) for item in items])
