"""A user's tables: which column is what, and how a row is read."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recbole_simdiff.data.raw_formats import Format, Interaction, parse_id, parse_rating
from recbole_simdiff.data.times import parse_any_time
from recbole_simdiff.errors import UserError

# Tried in this order where none is given; a blank is last, since dates and titles have some.
_SEPARATORS = ("\t", "::", ";", "|", ",", " ")

_ROLES = ("user", "item", "time", "rating")


@dataclass(frozen=True)
class TableColumns:
    """Where a table has users, items, times and, if it has them, ratings.

    Attributes:
        columns (tuple): of user, item, time and perhaps rating: name, or number from 1.
        separator (str | None): between the columns of a text file; None recognises it.
        time_format (str | None): see ``parse_any_time``.
    """

    columns: tuple[str | int, ...]
    separator: str | None = None
    time_format: str | None = None

    @classmethod
    def of(
        cls, columns: str, separator: str | None = None, time_format: str | None = None
    ) -> "TableColumns":
        """The columns as a user types them: ``user,item,time[,rating]``, names or numbers.

        Raises:
            UserError: if there are not three or four different ones.
        """
        try:
            cells = [cell.strip() for cell in next(csv.reader([columns]), [])]
        except csv.Error:
            cells = []
        if not 3 <= len(cells) <= 4 or len(set(cells)) < len(cells) or not all(cells):
            raise UserError(
                f"--columns={columns} must name three or four different columns: user,item,time or "
                "user,item,time,rating. Each is a name from the first line, or a number from 1"
            )
        numbers = [int(cell) if cell.isdecimal() else cell for cell in cells]
        if 0 in numbers:
            raise UserError(f"--columns={columns}: columns are numbered from 1")
        return cls(tuple(numbers), separator, time_format)

    @property
    def has_ratings(self) -> bool:
        """Whether there is a column of ratings."""
        return len(self.columns) == len(_ROLES)

    def format_of(self, line: str) -> Format:
        """How the lines of a text file are read, given its first one.

        Without a separator that is the first under which the columns are there and the line has a
        time; else the line holds names. Lines have as many cells as the first one.

        Raises:
            UserError: if the line does not have the columns.
        """
        candidates = _SEPARATORS if self.separator is None else (self.separator,)
        fitting = [(s, cells) for s in candidates if self._has(cells := _split(line, s))]
        if not fitting:
            raise UserError(self._lacking(line, candidates))
        with_time = [(s, cells) for s, cells in fitting if self._is_row(cells)]
        separator, cells = (with_time or fitting)[0]
        places = self.places(cells)
        header = not with_time
        kind = "first line of names" if header else "no line of names"
        names = ", ".join(
            f"{role}={cells[place] if header else place + 1}"
            for role, place in zip(_ROLES, places, strict=False)
        )
        return Format(
            f"table, separator {separator!r}, {kind}, {names}",
            fits=lambda _: True,
            parse=self._parser(separator, len(cells), places),
            header=header,
        )

    def places(self, names: Sequence[str]) -> list[int]:
        """Numbers from 0 of the columns among all columns of a file.

        Raises:
            ValueError: if one is not there.
        """
        return [c - 1 if isinstance(c, int) else list(names).index(c) for c in self.columns]

    def interaction(self, cells: Sequence[Any]) -> list[Interaction]:
        """What a row says, given its cells of user, item, time and perhaps rating.

        Raises:
            ValueError: if one of them cannot be read.
        """
        user, item, time, *rating = cells
        number = parse_rating(rating[0]) if rating else 0.0
        return [(parse_id(user), parse_id(item), number, *parse_any_time(time, self.time_format))]

    def require(self, names: Sequence[str], what: str) -> None:
        """Refuse a file without the columns.

        Args:
            names (Sequence): of all columns of the file.
            what (str): the file, as the message begins.

        Raises:
            UserError: naming those that it lacks.
        """
        if not self._has(names):
            raise UserError(f"{what} has the columns {', '.join(names)}; {self._asked()}")

    def _has(self, cells: Sequence[str]) -> bool:
        named = {c for c in self.columns if isinstance(c, str)}
        largest = max([3, *(c for c in self.columns if isinstance(c, int))])
        return named <= {*cells} and len(cells) >= largest

    def _is_row(self, cells: Sequence[str]) -> bool:
        """Whether a line holds values and not names: its time can be read."""
        if any(isinstance(column, str) for column in self.columns):
            return False
        try:
            parse_any_time(cells[self.places(cells)[2]], self.time_format)
        except ValueError:
            return False
        return True

    def _parser(
        self, separator: str, n_cells: int, places: Sequence[int]
    ) -> Callable[[str], list[Interaction]]:
        def parse(line: str) -> list[Interaction]:
            cells = _split(line, separator)
            if len(cells) != n_cells:
                raise ValueError(f"{len(cells)} fields instead of {n_cells}")
            return self.interaction([cells[place].strip() for place in places])

        return parse

    def _asked(self) -> str:
        return f"--columns={','.join(map(str, self.columns))} asks for others"

    def _lacking(self, line: str, separators: Sequence[str]) -> str:
        shown = line if len(line) <= 80 else f"{line[:77]}..."
        tried = f"separator {' or '.join(map(repr, separators))}"
        hint = "; --separator gives another" if self.separator is None else ""
        return f"the first line {shown!r} has other columns: {self._asked()} ({tried}{hint})"


def _split(line: str, separator: str) -> list[str]:
    """Cells of a line; a separator of one character may stand inside quotes."""
    if len(separator) > 1:
        return [cell.strip() for cell in line.split(separator)]
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator))]
    except csv.Error as error:
        raise ValueError(f"not a line of cells ({error})") from None
