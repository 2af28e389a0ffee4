"""A pandas DataFrame as a data set: an atomic file under a name that its content decides."""

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_atomically

HEADER = "user_id:token\titem_id:token\ttimestamp:float"

NANO = 10**9


def write_frame(
    frame: pd.DataFrame,
    folder: Path,
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
) -> str:
    """Write the interactions of a DataFrame as an atomic file, unless it is there.

    Args:
        frame (DataFrame): an interaction a row.
        folder (Path): of data sets; the file is ``NAME/NAME.inter`` in it.
        user, item (str): columns of ids, which become text.
        time (str): column of numbers, or of dates, which become seconds since 1970.

    Returns:
        str: NAME, the same for the same interactions in the same order.

    Raises:
        UserError: if a column is missing, or has cells that cannot be used.
        OSError: if the file cannot be written.
    """
    for key, column in (("user", user), ("item", item), ("time", time)):
        if list(frame.columns).count(column) != 1:
            named = ", ".join(map(str, frame.columns))
            raise UserError(f"{key}={column!r} must be one column of the DataFrame; it has {named}")
    columns = [_ids(frame[user], "user"), _ids(frame[item], "item"), _times(frame[time])]
    lines = [HEADER, *map("\t".join, zip(*columns, strict=True))]
    content = ("\n".join(lines) + "\n").encode()
    name = f"frame-{hashlib.blake2b(content, digest_size=6).hexdigest()}"
    path = folder / name / f"{name}.inter"
    if not path.is_file():
        write_atomically(path, lambda place: Path(place).write_bytes(content))
    return name


def _ids(column: Any, key: str) -> list[str]:
    """The ids as text.

    Raises:
        UserError: if one is missing, or cannot stand in a line of an atomic file.
    """
    ids = [
        "" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)
    ]
    if absent := ids.count(""):
        raise UserError(f"{key}={column.name!r}: {absent} of {len(ids)} rows have no id; drop them")
    for value in ids:
        if len(value.splitlines()) > 1 or value != value.strip("\n\r") or "\t" in value:
            raise UserError(
                f"{key}={column.name!r}: the id {value!r} has a tab or a line break in it"
            )
    return ids


def _times(column: Any) -> list[str]:
    """Numbers as they are, dates as seconds since 1970.

    Raises:
        UserError: if the column has neither, or a time is missing or not finite.
    """
    if absent := int(column.isna().sum()):
        raise UserError(
            f"time={column.name!r}: {absent} of {len(column)} rows have no time; drop them"
        )
    if pd.api.types.is_datetime64_any_dtype(column):
        ticks = pd.DatetimeIndex(column).as_unit("ns").asi8.tolist()
        return [
            f"{'-' if tick < 0 else ''}{abs(tick) // NANO}.{abs(tick) % NANO:09d}" for tick in ticks
        ]
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if not numeric:
        raise UserError(
            f"time={column.name!r} must be of numbers or dates, not {column.dtype}; "
            "pandas.to_datetime makes dates of text"
        )
    times = column.tolist()
    if not all(abs(value) < float("inf") for value in times):
        raise UserError(f"time={column.name!r} must be of finite numbers")
    return [repr(value) for value in times]
