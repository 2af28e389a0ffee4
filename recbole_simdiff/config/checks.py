"""What ``Config`` refuses: unknown keys, wrong types and forms, values that contradict others.

Ranges of single values are in ``limits``, what keys are for in ``keys``, and what concerns several
keys of one model in the model's ``check_config``.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType

from recbole_simdiff.config.keys import (
    DERIVED,
    FILES,
    LABELS,
    PRELOADED,
    REFUSED,
    STAGE_KEYS,
    UNLISTED,
    UNLISTED_OF_MODEL,
    UNREAD,
    WRITTEN,
    reads,
)
from recbole_simdiff.config.limits import CHOICES
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.rules import is_number

_EVAL_ARGS = ("split", "group_by", "order", "mode")

_LEAVE_OUT = ("valid_and_test", "valid_only", "test_only")


def interval(key: str, value: Any, source: str) -> Any:
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
            raise UserError(
                f'{key}={value!r} ({source}) must be an interval such as "[5,inf)"', keys=(key,)
            )
    return value


def separator(key: str, value: Any) -> str:
    r"""What stands between columns, or between the values of a cell; ``\t`` is a tab.

    Raises:
        UserError: if it is no text.
    """
    if not isinstance(value, str) or not value or {"\n", "\r"} & {*value}:
        raise UserError(
            f"{key}={value!r} must be text within a line: one character or several, such as ','; "
            r"\t is a tab",
            keys=(key,),
        )
    return value.replace("\\t", "\t")


def check_eval_args(args: Mapping[str, Any]) -> None:
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
                raise UserError(
                    f"{name}: unknown key {key!r}{hint} It has {', '.join(known)}",
                    keys=("eval_args",),
                )
    for value in modes.values():
        if not re.fullmatch(r"full|(uni|pop)[1-9]\d*", str(value)):
            raise UserError(
                f"eval_args: mode={mode!r} must be full, uni100 or pop100, of any number",
                keys=("eval_args",),
            )
    _check_split(args["split"])
    if group_by != "user" and str(group_by).lower() != "none":
        raise UserError(
            f"eval_args: group_by={group_by!r} must be user or none", keys=("eval_args",)
        )


def _check_split(given: Any) -> None:
    """Refuse a ``split`` that is neither leave-one-out nor three shares."""
    split = given if isinstance(given, dict) and len(given) == 1 else {}
    shares = split.get("RS", split.get("TS"))
    by_shares = (
        isinstance(shares, list)
        and len(shares) == 3
        and all(is_number(share) and 0 <= share < math.inf for share in shares)
        and shares[0] > 0
    )
    if not by_shares and split.get("LS") not in _LEAVE_OUT:
        raise UserError(
            f"eval_args: split={given!r} must be {{LS: one of {', '.join(_LEAVE_OUT)}}}, "
            "or shares of training, validation and test such as {RS: [0.8, 0.1, 0.1]} or "
            "{TS: [0.8, 0.1, 0.1]}",
            keys=("eval_args",),
        )


def wanted_type(key: str, default: Any, value: Any) -> str | None:
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


def check_keys(config: Any, own: set[str]) -> None:
    """Refuse keys that nothing would read.

    Args:
        config (Config): being put together.
        own (set): keys of the files that do not depend on the data set.

    Raises:
        UserError: naming the key and the nearest that is known.
    """
    known = {key for keys in config.parameters.values() for key in keys} | own | UNLISTED
    known |= UNLISTED_OF_MODEL.get(config.model, set())
    known -= DERIVED | WRITTEN | UNREAD.keys() | set(FILES)
    for key, source in config.given.items():
        value = config.external_config_dict[key]
        if key in ("model", "dataset"):
            chosen = config.name if key == "model" else config.dataset
            if value not in (chosen, config.model_as_given):
                raise UserError(
                    f"{key}={value!r} ({source}) contradicts --{key}={chosen}", keys=(key,)
                )
            continue
        if key in REFUSED and value:
            raise UserError(f"{key} ({source}) is not supported: {REFUSED[key]}")
        if key in STAGE_KEYS and key in known:
            _check_stage(config, key, source)
        default = config.internal_config_dict
        stored = config.is_stored(key) and (key in default or key in WRITTEN)
        if key in known or stored or (key in default and value == default[key]):
            continue
        if key in UNREAD:
            raise UserError(f"{key}={value!r} ({source}) has no effect: {UNREAD[key]}", keys=(key,))
        raise _unknown(config, key, known)


def _unknown(config: Any, key: str, known: set[str]) -> UserError:
    """The error for a key that nothing reads, with the nearest name."""
    near = difflib.get_close_matches(key, [*FILES, *known], n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    if near and near[0] in FILES:
        hint = "; YAML files are given by config_files."
    own = config.own if not config.wraps else None
    named = (own and own.reference) or config.name
    return UserError(
        f"unknown key {key!r} ({config.given[key]}) for model={config.name}{hint} "
        f"'list --explain --model={named}' shows every key",
        keys=("model",),
    )


def _check_stage(config: Any, key: str, source: str) -> None:
    """Refuse a key of S3Rec's stages, unless both say nothing, as in a stored configuration."""
    given, default = config.external_config_dict, config.internal_config_dict
    if any(k not in given or given[k] != default[k] for k in STAGE_KEYS):
        raise UserError(
            f"{key}={given[key]!r} ({source}) is not supported: both stages of {config.model} "
            "run in turn here, pretrain_epochs of the first and epochs of the second; "
            "pretrain_epochs=0 trains the second alone. Pickled files (.pth) are never opened",
            keys=(key, "pretrain_epochs"),
        )


def check_types(config: Any) -> None:
    """Refuse given values of another type than the defaults they replace; make numbers alike.

    Raises:
        UserError: naming key, value, origin and the default.
    """
    for key, source in config.given.items():
        default, value = config.internal_config_dict.get(key), config.external_config_dict[key]
        if key.endswith("_inter_num_interval"):
            value = config.external_config_dict[key] = interval(key, value, source)
        wanted = wanted_type(key, default, value)
        if wanted:
            raise UserError(
                f"{key}={value!r} ({source}) must be {wanted}; the default is {default!r} "
                f"({config.origin.get(key)})",
                keys=(key,),
            )
        if isinstance(default, float) and isinstance(value, int):
            config.external_config_dict[key] = float(value)
        elif isinstance(default, int) and isinstance(value, float):
            config.external_config_dict[key] = int(value)


def check_metrics(config: Any) -> None:
    """Refuse metrics, cut-offs and tails that RecBole cannot compute.

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
    cuts = [topk] if isinstance(topk, int) else topk
    if not isinstance(cuts, list) or not cuts or any(type(k) is not int or k < 1 for k in cuts):
        raise UserError(
            f"topk={topk} must be whole numbers of at least 1, e.g. [5, 10]", keys=("topk",)
        )
    _check_tail(config.final_config_dict.get("tail_ratio"))


def _check_tail(tail: Any) -> None:
    """Refuse a ``tail_ratio`` that is neither a share nor a count."""
    whole = is_number(tail) and tail >= 2 and float(tail).is_integer()
    if tail is not None and not whole and not (is_number(tail) and 0 < tail <= 1):
        raise UserError(
            f"tail_ratio={tail!r} must be a share of the items in (0, 1], those trained on "
            "least, or a whole number from 2 on: items with at most so many training targets",
            keys=("tail_ratio",),
        )


def check_values(config: Any) -> None:
    """Refuse values that no model can use, and those that contradict each other.

    Args:
        config (Config): complete.

    Raises:
        UserError: naming keys, values and what is allowed.
    """
    final = config.final_config_dict
    for key, allowed in CHOICES.items():
        if key in final and final[key] not in allowed:
            raise UserError(
                f"{key}={final[key]!r} ({config.origin.get(key)}) is not one of "
                f"{', '.join(map(str, allowed))}",
                keys=(key,),
            )
    if final["eval_args"]["order"] != "TO":
        raise UserError(
            f"eval_args: order={final['eval_args']['order']!r} must be TO, by time: the models "
            "are sequential",
            keys=("eval_args",),
        )
    _check_clipping(final["clip_grad_norm"])
    _check_selection(config)
    if not config.is_plugin and final["train_sampling"] != "prefix_last":
        raise UserError(
            f"train_sampling={final['train_sampling']} is not available for "
            f"{config.model}, which is trained on RecBole's rows, prefixes (prefix_last)",
            keys=("train_sampling",),
        )
    _check_transform(config)
    groups = final["length_groups"]
    whole = isinstance(groups, list) and all(type(k) is int for k in groups)
    if not whole or sorted({0, *groups}) != [0, *groups]:
        raise UserError(
            f"length_groups={groups} must be rising whole numbers, e.g. [5, 20]",
            keys=("length_groups",),
        )
    _check_columns(config)


def _check_clipping(clip: Any) -> None:
    """Refuse a ``clip_grad_norm`` that PyTorch would not take."""
    if clip is not None and not (
        isinstance(clip, dict)
        and "max_norm" in clip
        and clip.keys() <= {"max_norm", "norm_type"}
        and all(is_number(value) and value > 0 for value in clip.values())
    ):
        raise UserError(
            f"clip_grad_norm={clip} must be like {{max_norm: 1.0}} or {{max_norm: 1.0, "
            "norm_type: 2}, with positive numbers",
            keys=("clip_grad_norm",),
        )


def _check_selection(config: Any) -> None:
    """Refuse a ``valid_metric`` that is not computed."""
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
        restored (Collection): origins of whole configurations, which need not have been asked for.

    Raises:
        UserError: saying what is needed.
    """
    final = config.final_config_dict
    modes = final["eval_args"]["mode"]
    ranked = "test" in config.held_out and modes["test"] == "full"
    if final["save_rankings"] and not ranked and config.given.get("save_rankings") not in restored:
        raise UserError(
            "save_rankings=True writes ranks of the test among all items, which needs a test "
            f"part and mode: full; eval_args={final['eval_args']}",
            keys=("save_rankings", "eval_args"),
        )


def _check_columns(config: Any) -> None:
    """Refuse labels and weights that the model does not read, and the loss of what it does."""
    final = config.final_config_dict
    kept = {column: f"[{least},inf)" for column, least in (final["threshold"] or {}).items()}
    for (key, *others), readers, why in (
        (
            ("threshold", "val_interval"),
            LABELS,
            f"reads no labels; val_interval={kept} keeps such events",
        ),
        (("preload_weight",), PRELOADED, "asks for no preloaded weights"),
    ):
        given = final[key] and not config.is_stored(key)
        if given and not reads(config.model_class, readers):
            raise UserError(
                f"{key}={final[key]} has no effect: {config.model} {why}", keys=(key, *others)
            )
    needed = {final["USER_ID_FIELD"], final["ITEM_ID_FIELD"]}
    for names in (final["unused_col"] or {}).values():
        if names == "*" or needed & set(names):
            raise UserError(
                f"unused_col={final['unused_col']} must not have {', '.join(sorted(needed))}, "
                "which every model reads",
                keys=("unused_col",),
            )


def _check_transform(config: Any) -> None:
    """Refuse transforms whose result the model does not read, and those that mask nothing."""
    final, own = config.final_config_dict, config.internal_config_dict["transform"]
    transform = final["transform"]
    if config.is_plugin and transform is not None:
        raise UserError(
            f"transform={transform} is not available for {config.model}, whose training "
            "batches are not RecBole's",
            keys=("transform",),
        )
    allowed = (own,) if own else (None, "inverse_itemseq")
    if transform not in allowed:
        raise UserError(
            f"transform={transform!r} must be {' or '.join(map(str, allowed))} for "
            f"{config.model}, which reads the result of no other",
            keys=("transform",),
        )
    length = final["MAX_ITEM_LIST_LENGTH"]
    if transform == "mask_itemseq" and int(final["mask_ratio"] * length) < 1:
        raise UserError(
            f"mask_ratio={final['mask_ratio']} of MAX_ITEM_LIST_LENGTH={length} items masks "
            "none of them; one at least is needed",
            keys=("mask_ratio", "MAX_ITEM_LIST_LENGTH"),
        )
