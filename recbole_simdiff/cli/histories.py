"""Histories and ids of items as commands read them."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from recbole_simdiff.errors import UserError


class NamedHistory(NamedTuple):
    """A history with what it is called in answers, and with filters of its own.

    Attributes:
        name (str): a user, or the line it was read from.
        items (list): raw item ids, oldest first.
        exclude (list): raw item ids that must not be recommended.
        allowed (list | None): raw item ids of which alone recommendations are chosen.
    """

    name: str
    items: list[str]
    exclude: list[str] = []  # noqa: RUF012 (never changed)
    allowed: list[str] | None = None


def split_ids(text: str) -> list[str]:
    """Ids that are separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_ids(place: str) -> list[str]:
    """Ids of a file, one a line; empty lines are skipped.

    Raises:
        UserError: if it cannot be read, or has none.
    """
    try:
        with open(place, encoding="utf-8-sig") as file:
            ids = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {place}: {error}") from None
    if not ids:
        raise UserError(f"{place} has no id; it must have ids of items, one a line")
    return ids


def read_histories(place: str, option: str) -> Iterator[NamedHistory]:
    """Histories of a file, one a line: CSV of item ids, a JSON list, or a JSON object.

    Args:
        place (str): the file; ``-`` for standard input.
        option (str): name of the option that it was given with.

    Raises:
        UserError: if it cannot be read; naming the line.
    """
    try:
        if place == "-":
            if sys.__stdin__ is None:
                raise UserError(f"standard input is closed; give --{option}=FILE")
            yield from _histories(sys.stdin, "standard input")
        else:
            with open(place, encoding="utf-8-sig") as file:
                yield from _histories(file, place)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {place}: {error}") from None


def _histories(lines: Iterable[str], source: str) -> Iterator[NamedHistory]:
    for number, line in enumerate(lines, start=1):
        line, name = line.removeprefix("\ufeff").strip(), f"line {number}"
        if not line:
            continue
        try:
            yield _history(line, name)
        except RecursionError:
            raise UserError(f"{source}, line {number}: nested too deep") from None
        except (ValueError, csv.Error) as error:
            raise UserError(f"{source}, line {number}: {error}") from None


def _history(line: str, name: str) -> NamedHistory:
    """The history of a line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if line[0] not in "[{":
        cells = [cell.strip() for cell in next(csv.reader([line])) if cell.strip()]
        return NamedHistory(name, cells)
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except ValueError:  # Python reads no longer ones
        raise ValueError("a number of more than 4300 digits; write ids as text") from None
    if not isinstance(value, dict):
        return NamedHistory(name, _ids(value))
    allowed = _ids(value["allowed"]) if value.get("allowed") is not None else None
    name = str(value.get("user", name))
    return NamedHistory(name, _ids(value.get("items")), _ids(value.get("exclude", [])), allowed)


def _ids(value: object) -> list[str]:
    if not isinstance(value, list) or any(isinstance(item, list | dict) for item in value):
        raise ValueError(
            'expected item ids as [...] or {"items": [...]}; an object may have "exclude" and '
            '"allowed", lists of ids, too'
        )
    return [str(item) for item in value]
