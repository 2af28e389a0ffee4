"""The one exception that stands for a mistake the user can mend, and checks that raise it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_MESSAGE = 2_000  # characters; a value may have millions


class UserError(ValueError):
    """A wrong key, value, file or checkpoint.

    The message says what was received, what is allowed and where to change it; of a long one the
    middle is left out. The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            end = LONGEST_MESSAGE // 2
            message = f"{message[:end]} ... {message[-end:]}"
        super().__init__(message)


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
            raise UserError(f"{key}={config[key]!r} is not one of {', '.join(allowed)}")


def require_at_least(config: Any, least: Mapping[str, float]) -> None:
    """Refuse values below a bound, infinite ones and NaN.

    Args:
        config (Config): resolved configuration.
        least (Mapping): key -> smallest allowed value.

    Raises:
        UserError: naming the key, its value and the bound.
    """
    for key, bound in least.items():
        if not bound <= config[key] < math.inf:
            raise UserError(f"{key}={config[key]} must be at least {bound}")


def require_share(config: Any, *keys: str) -> None:
    """Refuse values outside [0, 1] and NaN.

    Args:
        config (Config): resolved configuration.
        *keys (str): keys to check.

    Raises:
        UserError: naming the key and its value.
    """
    for key in keys:
        if not 0 <= config[key] <= 1:
            raise UserError(f"{key}={config[key]} must lie in [0, 1]")


def require_positive(config: Any, *keys: str) -> None:
    """Refuse values that are not positive and finite.

    Args:
        config (Config): resolved configuration.
        *keys (str): keys to check.

    Raises:
        UserError: naming the key and its value.
    """
    for key in keys:
        if not 0 < config[key] < math.inf:
            raise UserError(f"{key}={config[key]} must be positive")
