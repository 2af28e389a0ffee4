"""Forms of single values: intervals, separators, eval_args, types."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.rules import is_number

_EVAL_ARGS = ("split", "group_by", "order", "mode")

_LEAVE_OUT = ("valid_and_test", "valid_only", "test_only")


def _interval(key: str, value: Any, source: str) -> Any:
    """A RecBole interval such as "[5,inf)"; at other text RecBole only warns and does not filter.

    Raises:
        UserError: if it is not one.
    """
    if isinstance(value, list) and len(value) == 2:  # [2,100] is also a YAML list
        value = f"[{value[0]},{value[1]}]"
    for part in str(value).split(";") if value is not None else ():
        ends = re.fullmatch(r"\s*[\[(]([^,]+),([^,]+)[\])]\s*", part)
        try:
            good = ends is not None and float(ends[1]) <= float(ends[2])
        except ValueError:
            good = False
        if not good:
            raise UserError(f'{key}={value!r} ({source}) must be an interval such as "[5,inf)"')
    return value


def _separator(key: str, value: Any) -> str:
    r"""What stands between columns, or between the values of a cell; ``\t`` is a tab.

    Raises:
        UserError: if it is no text.
    """
    if not isinstance(value, str) or not value or {"\n", "\r"} & {*value}:
        raise UserError(
            f"{key}={value!r} must be text within a line: one character or several, such as ','; "
            r"\t is a tab"
        )
    return value.replace("\\t", "\t")


def _check_eval_args(args: Mapping[str, Any]) -> None:
    """Refuse what RecBole would ignore in ``eval_args``, or only find once the data are read.

    Raises:
        UserError: naming the part and what is allowed.
    """
    mode, group_by = args["mode"], args["group_by"]
    modes = mode if isinstance(mode, dict) else {"valid": mode, "test": mode}
    for name, keys, known in (
        ("eval_args", args, _EVAL_ARGS),
        ("eval_args: mode", modes, ("valid", "test")),
    ):
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ";"
                raise UserError(f"{name}: unknown key {key!r}{hint} It has {', '.join(known)}")
    for value in modes.values():
        if not re.fullmatch(r"full|(uni|pop)[1-9]\d*", str(value)):
            raise UserError(
                f"eval_args: mode={mode!r} must be full, uni100 or pop100, of any number"
            )
    split = args["split"] if isinstance(args["split"], dict) and len(args["split"]) == 1 else {}
    shares = split.get("RS", split.get("TS"))
    by_shares = (
        isinstance(shares, list)
        and len(shares) == 3
        and all(is_number(share) and 0 <= share < math.inf for share in shares)
        and shares[0] > 0
    )
    if not by_shares and split.get("LS") not in _LEAVE_OUT:
        raise UserError(
            f"eval_args: split={args['split']!r} must be {{LS: one of {', '.join(_LEAVE_OUT)}}}, "
            "or shares of training, validation and test such as {RS: [0.8, 0.1, 0.1]} or "
            "{TS: [0.8, 0.1, 0.1]}"
        )
    if group_by != "user" and str(group_by).lower() != "none":
        raise UserError(f"eval_args: group_by={group_by!r} must be user or none")


def _wanted_type(key: str, default: Any, value: Any) -> str | None:
    """What ``value`` should have been, given the default it replaces; None if it is fine."""
    number = is_number(value)
    if number and isinstance(value, int) and abs(value) > 2**53:
        return "a number of at most 2^53"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if number and float(value).is_integer() else "a whole number"
    if isinstance(default, float):
        return None if number else "a number"
    if isinstance(default, str):
        return (
            None if isinstance(value, str | int | None) and not isinstance(value, bool) else "text"
        )
    if isinstance(default, list):
        one = key in ("metrics", "topk", "length_groups") and isinstance(value, str | int)
        return None if isinstance(value, list) or one else "a list"
    if isinstance(default, dict):
        return None if isinstance(value, dict | None) else "a mapping or None"
    return None
