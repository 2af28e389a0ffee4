"""Checks of ``Config``: how a model is evaluated, and by which metric its epoch is selected."""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType

from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.rules import is_number

_EVAL_ARGS = ("split", "group_by", "order", "mode")

_LEAVE_OUT = ("valid_and_test", "valid_only", "test_only")


def check_eval_args(args: Mapping[str, Any]) -> None:
    """Refuse parts of ``eval_args`` that RecBole would ignore, or refuse only after reading data.

    Args:
        args (Mapping): the value of ``eval_args``, complete.

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
                hint = f"; did you mean {near[0]}? Allowed" if near else "; allowed"
                raise UserError(
                    f"{name}: unknown key {key!r}{hint} are {', '.join(known)}",
                    keys=("eval_args",),
                )
    for value in modes.values():
        if not re.fullmatch(r"full|(uni|pop)[1-9]\d*", str(value)):
            raise UserError(
                f"eval_args: mode={mode!r} must be full, or uni or pop with a number, such as "
                "uni100 or pop100",
                keys=("eval_args",),
            )
    _check_split(args["split"])
    if group_by != "user" and str(group_by).lower() != "none":
        raise UserError(
            f"eval_args: group_by={group_by!r} must be user or none", keys=("eval_args",)
        )


def _check_split(given: Any) -> None:
    """Refuse a ``split`` that is neither leave-one-out nor three ratios."""
    split = given if isinstance(given, dict) and len(given) == 1 else {}
    ratios = split.get("RS", split.get("TS"))
    by_ratios = (
        isinstance(ratios, list)
        and len(ratios) == 3
        and all(is_number(ratio) and 0 <= ratio < math.inf for ratio in ratios)
        and ratios[0] > 0
    )
    if not by_ratios and split.get("LS") not in _LEAVE_OUT:
        raise UserError(
            f"eval_args: split={given!r} must be {{LS: one of {', '.join(_LEAVE_OUT)}}}, "
            "or ratios of training, validation and test such as {RS: [0.8, 0.1, 0.1]} or "
            "{TS: [0.8, 0.1, 0.1]}",
            keys=("eval_args",),
        )


def check_metrics(config: Any) -> None:
    """Refuse metrics, cutoffs and tails that RecBole cannot compute.

    Args:
        config (Config): with its final values.

    Raises:
        UserError: naming key, value and what is allowed.
    """
    metrics, topk = config.final_config_dict["metrics"], config.final_config_dict["topk"]
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, list) or not names or any(type(n) is not str for n in names):
        raise UserError(
            f"metrics={metrics} must be names of metrics, e.g. [Hit, NDCG]", keys=("metrics",)
        )
    ranking = sorted(k for k, v in metric_types.items() if v == EvaluatorType.RANKING)
    for name in names:
        if name.lower() not in ranking:
            raise UserError(
                f"metrics={metrics}: {name!r} is not one of {', '.join(ranking)}",
                keys=("metrics",),
            )
    cutoffs = [topk] if isinstance(topk, int) else topk
    whole = isinstance(cutoffs, list) and all(type(k) is int and k >= 1 for k in cutoffs)
    if not whole or not cutoffs:
        raise UserError(
            f"topk={topk} must be whole numbers of at least 1, e.g. [5, 10]", keys=("topk",)
        )
    _check_tail(config.final_config_dict.get("tail_ratio"))


def _check_tail(tail: Any) -> None:
    """Refuse a ``tail_ratio`` that is neither a ratio nor a count."""
    whole = is_number(tail) and tail >= 2 and float(tail).is_integer()
    if tail is not None and not whole and not (is_number(tail) and 0 < tail <= 1):
        raise UserError(
            f"tail_ratio={tail!r} must be a ratio in (0, 1], the part of the items with the fewest "
            "training targets, or a whole number of at least 2, the greatest number of training "
            "targets of a tail item",
            keys=("tail_ratio",),
        )


def check_selection(config: Any) -> None:
    """Refuse a ``valid_metric`` that is not computed.

    Args:
        config (Config): with its final values.

    Raises:
        UserError: naming the metric, and the metrics and cutoffs that are computed.
    """
    final = config.final_config_dict
    metric, _, k = str(final["valid_metric"]).partition("@")
    metrics = [name.lower() for name in final["metrics"]]
    wrong_k = bool(k) if metric.lower() == "gauc" else k not in map(str, final["topk"])
    if metric.lower() not in metrics or wrong_k:
        raise UserError(
            f"valid_metric={final['valid_metric']} ({config.origin.get('valid_metric')}) must be "
            f"one of metrics={final['metrics']} at one of topk={final['topk']}, e.g. "
            f"{final['metrics'][0]}@{final['topk'][0]}",
            keys=("valid_metric", "metrics", "topk"),
        )


def check_rankings(config: Any, restored: Collection[str]) -> None:
    """Refuse ``save_rankings`` without a test among all items.

    Args:
        config (Config): complete.
        restored (Collection): origins of complete configurations. There the key may be on without
            the user's request, and is not refused.

    Raises:
        UserError: naming what is needed.
    """
    final = config.final_config_dict
    modes = final["eval_args"]["mode"]
    ranked = "test" in config.held_out and modes["test"] == "full"
    if final["save_rankings"] and not ranked and config.given.get("save_rankings") not in restored:
        raise UserError(
            "save_rankings=True writes the test ranks among all items. This needs a test part and "
            f"mode: full; eval_args={final['eval_args']}",
            keys=("save_rankings", "eval_args"),
        )
