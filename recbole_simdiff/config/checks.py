"""Checks of ``Config``: unknown keys, wrong types and forms, values that contradict each other.

Checks of the evaluation are in ``evaluation_checks``, ranges of single values in ``limits``,
purposes of keys in ``keys``, and rules about several keys of one model in its ``check_config``.
"""

import difflib
import re
from collections.abc import Collection
from typing import Any

from recbole_simdiff.config.evaluation_checks import check_selection
from recbole_simdiff.config.keys import (
    DERIVED,
    FILES,
    LABELS,
    PRELOADED,
    REFUSED,
    RETIRED,
    STAGE_KEYS,
    UNLISTED,
    UNLISTED_OF_MODEL,
    UNREAD,
    WRITTEN,
    reads,
)
from recbole_simdiff.config.limits import CHOICES
from recbole_simdiff.config.start_checks import check_start
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.rules import is_number


def interval(key: str, value: Any, source: str) -> Any:
    """A RecBole interval such as "[5,inf)".

    RecBole itself only warns about other text, and then filters nothing.

    Args:
        key (str): key of the value, for the message.
        value (Any): the interval, a list of two numbers, or None.
        source (str): where it was set, for the message.

    Returns:
        Any: the interval as text; None for None.

    Raises:
        UserError: if it is not an interval.
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
    r"""The separator of columns, or of the values in a cell; ``\t`` becomes a tab.

    Raises:
        UserError: if it is not text, is empty, or has a line break.
    """
    if not isinstance(value, str) or not value or {"\n", "\r"} & {*value}:
        raise UserError(
            f"{key}={value!r} must be text without a line break: one character or more, such as "
            r"','; \t is a tab",
            keys=(key,),
        )
    return value.replace("\\t", "\t")


def expected_type(key: str, default: Any, value: Any) -> str | None:
    """The type that ``value`` should have, by the default that it replaces; None if it is right.

    Args:
        key (str): its key; some take a single value in place of a list.
        default (Any): the default.
        value (Any): the value.
    """
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
        single = key in ("metrics", "topk", "length_groups") and isinstance(value, str | int)
        return None if isinstance(value, list) or single else "a list"
    if isinstance(default, dict):
        return None if isinstance(value, dict | None) else "a mapping or None"
    return None


def drop_retired(config: Any, models: Collection[str]) -> None:
    """Take options that are gone out of what was given, where they have their old default.

    Files and checkpoints of former versions name them. Those of a method around a backbone shaped
    pseudo-items, which a checkpoint holds, so it may have any value of them.

    Args:
        config (Config): being put together.
        models (Collection): names of the model and of those that it derives from.

    Raises:
        UserError: naming the option, if it has another value.
    """
    options = [(name, *option) for name in models for option in RETIRED.get(name, {}).items()]
    for name, key, default in options:
        if key not in config.given:
            continue
        shaped_data = config.wraps and name == config.name and config.is_stored(key)
        value = config.external_config_dict.pop(key)
        source = config.given.pop(key)
        if value != default and not shaped_data:
            raise UserError(
                f"{key}={value!r} ({source}): {config.name} has this option no more; it works as "
                f"with {key}={default}",
                keys=("model",),
            )


def check_keys(config: Any, default_keys: set[str]) -> None:
    """Refuse keys that nothing reads.

    Args:
        config (Config): with its files and overrides read.
        default_keys (set): keys of the files that do not depend on the data set.

    Raises:
        UserError: naming the key and the most similar known key.
    """
    known = {key for keys in config.parameters.values() for key in keys} | default_keys | UNLISTED
    known |= UNLISTED_OF_MODEL.get(config.model, set())
    known -= DERIVED | WRITTEN | UNREAD.keys() | set(FILES)
    for key, source in config.given.items():
        value = config.external_config_dict[key]
        if key in ("model", "dataset"):
            name = config.name if key == "model" else config.dataset
            if value not in (name, config.model_as_given):
                raise UserError(
                    f"{key}={value!r} ({source}) contradicts --{key}={name}", keys=(key,)
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
    """The error for a key that nothing reads, with the most similar name."""
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
    """Refuse a key of S3Rec's stages, unless both are at their defaults, as in a checkpoint."""
    given, default = config.external_config_dict, config.internal_config_dict
    if any(k not in given or given[k] != default[k] for k in STAGE_KEYS):
        raise UserError(
            f"{key}={given[key]!r} ({source}) is not supported: both stages of {config.model} are "
            "trained in one run, the first for pretrain_epochs and the second for epochs. "
            "pretrain_epochs=0 trains only the second. Pickled files (.pth) are never opened",
            keys=(key, "pretrain_epochs"),
        )


def check_types(config: Any) -> None:
    """Refuse values of another type than their defaults; convert whole numbers and floats.

    Args:
        config (Config): with its files and overrides read.

    Raises:
        UserError: naming key, value, origin and the default.
    """
    for key, source in config.given.items():
        default, value = config.internal_config_dict.get(key), config.external_config_dict[key]
        if key.endswith("_inter_num_interval"):
            value = config.external_config_dict[key] = interval(key, value, source)
        expected = expected_type(key, default, value)
        if expected:
            raise UserError(
                f"{key}={value!r} ({source}) must be {expected}; the default is {default!r} "
                f"({config.origin.get(key)})",
                keys=(key,),
            )
        if isinstance(default, float) and isinstance(value, int):
            config.external_config_dict[key] = float(value)
        elif isinstance(default, int) and isinstance(value, float):
            config.external_config_dict[key] = int(value)


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
            f"eval_args: order={final['eval_args']['order']!r} must be TO (by time), because the "
            "models are sequential",
            keys=("eval_args",),
        )
    _check_clipping(final["clip_grad_norm"])
    check_selection(config)
    check_start(config)
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
            f"length_groups={groups} must be increasing whole numbers above 0, e.g. [5, 20]",
            keys=("length_groups",),
        )
    _check_columns(config)


def _check_clipping(clip: Any) -> None:
    """Refuse a ``clip_grad_norm`` that PyTorch would not accept."""
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


def _check_columns(config: Any) -> None:
    """Refuse labels and weights that the model does not read, and unused columns that it needs."""
    final = config.final_config_dict
    bounds = final["threshold"] or {}
    intervals = {column: f"[{minimum},inf)" for column, minimum in bounds.items()}
    for (key, *others), readers, reason in (
        (
            ("threshold", "val_interval"),
            LABELS,
            f"reads no labels; val_interval={intervals} keeps such events",
        ),
        (("preload_weight",), PRELOADED, "reads no preloaded weights"),
    ):
        given = final[key] and not config.is_stored(key)
        if given and not reads(config.model_class, readers):
            raise UserError(
                f"{key}={final[key]} has no effect: {config.model} {reason}", keys=(key, *others)
            )
    needed = {final["USER_ID_FIELD"], final["ITEM_ID_FIELD"]}
    for names in (final["unused_col"] or {}).values():
        if names == "*" or needed & set(names):
            raise UserError(
                f"unused_col={final['unused_col']} must not include {', '.join(sorted(needed))}, "
                "which every model reads",
                keys=("unused_col",),
            )


def _check_transform(config: Any) -> None:
    """Refuse transforms whose result the model does not read, and masks without any item."""
    final, default = config.final_config_dict, config.internal_config_dict["transform"]
    transform = final["transform"]
    if config.is_plugin and transform is not None:
        raise UserError(
            f"transform={transform} is not available for {config.model}, whose training "
            "batches are not RecBole's",
            keys=("transform",),
        )
    allowed = (default,) if default else (None, "inverse_itemseq")
    if transform not in allowed:
        raise UserError(
            f"transform={transform!r} must be {' or '.join(map(str, allowed))} for "
            f"{config.model}, which does not read the result of any other transform",
            keys=("transform",),
        )
    length = final["MAX_ITEM_LIST_LENGTH"]
    if transform == "mask_itemseq" and int(final["mask_ratio"] * length) < 1:
        raise UserError(
            f"mask_ratio={final['mask_ratio']} of MAX_ITEM_LIST_LENGTH={length} items masks no "
            "item; at least one must be masked",
            keys=("mask_ratio", "MAX_ITEM_LIST_LENGTH"),
        )
