"""Tables of what keys may be: the rules of single values, and checks that read such tables.

A model declares ``OPTIONS`` (key -> names) and ``RANGES`` (key -> rule). Only what concerns several
keys is code, in the model's ``check_config``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from recbole_simdiff.errors import UserError

MAXIMUM = 2**31 - 1  # of whole numbers whose rule names no other


class Rule(NamedTuple):
    """A test of a value and, for the message, what the value must do."""

    holds: Callable[[Any], bool]
    condition: str


def is_number(value: Any) -> bool:
    """Whether it is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(minimum: int, maximum: int = MAXIMUM) -> Rule:
    """From ``minimum`` to ``maximum``; the type of the default makes the number a whole one."""
    return Rule(
        lambda value: is_number(value) and minimum <= value <= maximum,
        f"be at least {minimum}, at most {maximum:,}",
    )


def at_least(bound: float) -> Rule:
    """From ``bound`` on."""
    return Rule(lambda value: is_number(value) and value >= bound, f"be at least {bound}")


def among(*values: Any) -> Rule:
    """One of a few values."""
    return Rule(lambda value: value in values, f"be {' or '.join(map(str, values))}")


def whole_numbers(minimum: int | None = None, empty: bool = False) -> Rule:
    """A list of whole numbers.

    Args:
        minimum (int | None): the smallest that is allowed, if there is one.
        empty (bool): the list may have no element.
    """
    return Rule(
        lambda value: (
            isinstance(value, list)
            and (empty or bool(value))
            and all(type(n) is int and (minimum is None or n >= minimum) for n in value)
        ),
        "be a list of whole numbers" + ("" if minimum is None else f" of at least {minimum}"),
    )


positive = Rule(lambda value: is_number(value) and value > 0, "be positive")

ratio = Rule(lambda value: is_number(value) and 0 <= value <= 1, "lie in [0, 1]")

ratio_above_0 = Rule(lambda value: is_number(value) and 0 < value <= 1, "lie in (0, 1]")

ratio_below_1 = Rule(lambda value: is_number(value) and 0 <= value < 1, "lie in [0, 1)")

ratio_below_1_or_none = Rule(
    lambda value: value is None or ratio_below_1.holds(value), "lie in [0, 1), or be ~"
)

folder = Rule(lambda value: isinstance(value, str), "be a folder")

folder_or_none = Rule(lambda value: isinstance(value, str | None), "be a folder")


def require(config: Any, rules: Mapping[str, Rule]) -> None:
    """Refuse values that break their rule.

    Args:
        config (Config): resolved configuration.
        rules (Mapping): key -> its rule.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, rule in rules.items():
        if not rule.holds(config[key]):
            raise UserError(f"{key}={config[key]!r} must {rule.condition}", keys=(key,))


def require_choice(config: Any, options: Mapping[str, Sequence[str]]) -> None:
    """Refuse values that are not among the named ones.

    Args:
        config (Config): resolved configuration.
        options (Mapping): key -> allowed values.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    for key, allowed in options.items():
        if config[key] not in allowed:
            raise UserError(
                f"{key}={config[key]!r} is not one of {', '.join(allowed)}", keys=(key,)
            )


def require_multiple(config: Any, key: str, of: str) -> None:
    """Refuse a value that is no multiple of another key's.

    Raises:
        UserError: naming both keys and values.
    """
    if config[key] % config[of]:
        raise UserError(
            f"{key}={config[key]} must be a multiple of {of}={config[of]}", keys=(key, of)
        )


def require_at_most(config: Any, key: str, maximum: str) -> None:
    """Refuse a value above another key's.

    Raises:
        UserError: naming both keys and values.
    """
    if config[key] > config[maximum]:
        raise UserError(
            f"{key}={config[key]} must not exceed {maximum}={config[maximum]}", keys=(key, maximum)
        )
