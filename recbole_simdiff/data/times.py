"""Times of raw data: numbers of a unit that their size tells, and dates."""

import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d:\d\d)?", re.ASCII)

LAST_SECOND = 24 * 60 * 60 - 1  # of a day

MICRO = 10**6  # microseconds of a second

DATES = "dates"  # the unit of what is not a number

# Unit -> how many make a second. A number below 10^11 of a unit is before the year 5138, and at
# least 10^11 of the next finer one is after March 1973.
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}

_LIMIT = 10**11

_START = datetime(1970, 1, 1, tzinfo=UTC)


def _unit(number: Decimal | int) -> str:
    return next(name for name, n in _UNITS.items() if -_LIMIT * n < number < _LIMIT * n)


def parse_time(value: Any) -> tuple[int, str]:
    """Microseconds since 1970 of a whole number, and the unit that its size tells.

    Raises:
        ValueError: if it is no whole number.
    """
    try:
        number = int(str(value))
    except ValueError:
        number = 2**63
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"time {value!r} is not a whole number of seconds or a finer unit")
    unit = _unit(number)
    return number * MICRO // _UNITS[unit], unit


def parse_date(value: Any) -> int:
    """Seconds since 1970 of a date, read as UTC.

    Raises:
        ValueError: if it is not of that form.
    """
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise ValueError(f"date {value!r} is not YYYY-MM-DD or YYYY-MM-DD HH:MM:SS")
    return int(datetime.fromisoformat(value).replace(tzinfo=UTC).timestamp())


def parse_any_time(value: Any, time_format: str | None = None) -> tuple[int, str]:
    """Microseconds since 1970 of a number, a date or a text, and its unit.

    Args:
        value (Any): a number of seconds or a finer unit, fractions included; a date of ISO 8601,
            or a ``datetime``. A date without an offset is read as UTC.
        time_format (str | None): the form of dates as text, as ``strptime`` has it; numbers are
            then read by it, too.

    Raises:
        ValueError: if it is none of them.
    """
    if isinstance(value, date):
        moment = value if isinstance(value, datetime) else datetime(*value.timetuple()[:3])
        return _microseconds(moment), DATES
    text = str(value).strip()
    if time_format is not None:
        return _microseconds(datetime.strptime(text, time_format)), DATES
    try:
        number = Decimal(text)
    except InvalidOperation:
        return _microseconds(_iso(text)), DATES
    if not number.is_finite() or not -(2**63) <= number < 2**63:
        raise ValueError(f"time {value!r} is not a number of seconds or a finer unit")
    unit = _unit(number)
    return int(number * MICRO // _UNITS[unit]), unit


def _iso(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"time {text!r} is neither a number nor a date of ISO 8601; --time_format reads others"
        ) from None


def _microseconds(moment: datetime) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _START) // timedelta(microseconds=1)
