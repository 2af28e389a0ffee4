"""The checkpoint of a run: everything it must hold, checked once, when it is read.

A file may come from anywhere, and from any version of this package. What is checked here nobody
else need doubt; what only a model or its data can tell is checked where they are.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.data.statistics import Statistics
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import WRAPPERS
from recbole_simdiff.training.progress import Progress


def _fields(kind: type) -> dict[str, Any]:
    """Those of a dataclass, each with its type; the ones with a default may be missing."""
    hints = get_type_hints(kind)
    optional = {f.name for f in fields(kind) if {f.default, f.default_factory} != {MISSING}}
    return {f"{k}?" if k in optional else k: hint for k, hint in hints.items()}


# Name -> type of the value. A name that ends in ? may be missing.
_CONTENT: dict[str, Any] = {
    "config": {"model": str, "dataset": str, "values": dict[str, Any]},
    "versions": dict[str, str],
    "statistics": _fields(Statistics),
    "items": list[str],
    "users": list[str],
    "titles": dict[str, str],
    "n_users?": int,  # of a checkpoint without users and histories: how many there were
    "ready_rows?": str | None,
    "augmentation?": dict[str, Any],
    "phase_epochs?": dict[str, int],  # with epochs_from
    "own_model?": {"name": str, "file": str, "checksum": str},
    "progress": _fields(Progress),
}

_AUGMENTATION: dict[str, Any] = {
    "backbone?": str,
    "baseline?": {"model": str, "test": dict[str, Any], "by_length": dict[str, Any]},
    "quality?": dict[str, dict[str, float]],
}

_EPOCH: dict[str, Any] = {
    "phase": str,
    "epoch": int,
    "loss": dict[str, float],
    "monitor": dict[str, float],
    "seconds": float,
    "valid?": dict[str, float],
}

_OPTIMIZER: dict[str, Any] = {
    "groups": list[dict[str, Any]],
    "slots": dict[str, dict[str, float | bool | None]],
}

_RNG = ("torch", "python", "python_gauss", "numpy", "numpy_gauss")


def load_run(path: str | Path, resumable: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON content of a run's checkpoint.

    Args:
        path (str | Path): ``best`` or ``last`` of a run.
        resumable (bool): whether it must hold what a training is continued from.

    Raises:
        UserError: if the file cannot be read, or lacks or garbles anything.
    """
    path = Path(path)
    tensors, content = checkpoint.load(path)
    problem = (
        _differs(content, _CONTENT, "")
        or _ids(content)
        or _progress(content)
        or _augmentation(content, tensors)
        or _tensors(content, tensors)
        or (_resumable(path, content, tensors) if resumable else None)
    )
    if problem:
        raise checkpoint.foreign(path, problem)
    return tensors, content


def _differs(value: Any, expected: Any, name: str) -> str | None:
    """How a value differs from what it should be; None if it does not."""
    if not isinstance(expected, Mapping):
        return None if _fits(value, expected) else f"its {name} is {_short(value)}"
    if not isinstance(value, dict):
        return f"its {name} is {_short(value)}"
    for key, kind in expected.items():
        field = key.removesuffix("?")
        full = f"{name}.{field}" if name else field
        if field in value:
            if problem := _differs(value[field], kind, full):
                return problem
        elif field == key:
            return f"it lacks {full}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type; whole numbers are counts, from 0 on."""
    parts = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(v, parts[1]) for v in value.values())
    if kind is NoneType:
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float if kind is float else kind)


def _short(value: Any) -> str:
    if isinstance(value, list | dict):
        return (
            f"a {type(value).__name__} of other values"
            if value
            else f"an empty {type(value).__name__}"
        )
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _ids(content: Mapping[str, Any]) -> str | None:
    for name in ("items", "users"):
        ids = content[name]
        minimum = 1 if name == "users" and "n_users" in content else 2
        if len(ids) < minimum or ids[0] != "[PAD]" or len(set(ids)) < len(ids):
            return f"its {name} are not ids, each once, after [PAD]"
    return None


def _progress(content: Mapping[str, Any]) -> str | None:
    for name, kind in (("progress", Progress), ("statistics", Statistics)):
        for key in content[name].keys() - {f.name for f in fields(kind)}:
            return f"its {name} has {key!r}"
    progress = Progress(**content["progress"])
    for number, entry in enumerate(progress.log):
        if problem := _differs(entry, _EPOCH, f"progress.log[{number}]"):
            return problem
    finished = len(progress.log)
    if progress.epoch > finished or (not progress.phase and progress.epoch < finished):
        return f"its progress.epoch is {progress.epoch}, which its log contradicts"
    if progress.step and not progress.loss_sums:
        return "it lacks progress.loss_sums"
    return None


def _augmentation(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    wrapped = content["config"]["model"] in WRAPPERS and "n_users" not in content
    if wrapped and "data.pseudo" not in tensors:
        return "it lacks data.pseudo"
    notes = content.get("augmentation")
    return _differs(notes, _AUGMENTATION, "augmentation") if notes else None


def _tensors(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Whether weights are there, and histories and pseudo-items are of the ids there are."""
    n_items, n_users = len(content["items"]), len(content["users"])
    weights, data = checkpoint.subset(tensors, "model"), checkpoint.subset(tensors, "data")
    if not weights:
        return "it lacks the weights of the model"
    for key, value in content["config"]["values"].items():
        # Each layer has a weight. Building what is not there would take for ever.
        if key.endswith("layers") and isinstance(value, int) and value > len(weights):
            return f"its {key} is {value}, but it has {len(weights)} tensors of the model"
    occurs = data.get("item_counts", torch.zeros(n_items, dtype=torch.int))
    if occurs.shape != (n_items,) or occurs.is_floating_point() or occurs.min() < 0:
        return f"its data.item_counts are not those of {n_items - 1} items"
    if content.get("ready_rows") is None and "n_users" not in content:
        for name in ("history_items", "history_ends"):
            if name not in data:
                return f"it lacks data.{name}"
        items, ends = data["history_items"], data["history_ends"]
        counts = ends.shape == (n_users,) and torch.diff(ends, prepend=ends.new_zeros(1))
        if items.dim() != 1 or counts is False or counts.min() < 0 or ends[-1] != len(items):
            return f"its data.history_ends are not those of {n_users - 1} users"
    for name, minimum in (("history_items", 1), ("pseudo", 0)):
        items = data.get(name, torch.ones(1, dtype=torch.int))
        if items.is_floating_point() or ((items < minimum) | (items >= n_items)).any():
            return f"its data.{name} are not among its {n_items - 1} items"
    if "pseudo" in data and (data["pseudo"].dim() != 2 or len(data["pseudo"]) != n_users):
        return f"its data.pseudo are not those of {n_users - 1} users"
    return None


def _resumable(path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    for name in get_type_hints(Progress):
        if name not in content["progress"]:  # with its default another training would go on
            return f"it lacks progress.{name}"
    optimizers = {k: v for k, v in content.items() if k.startswith("optimizer")}
    if not optimizers:
        if path.name != LAST:
            raise UserError(f"{path} cannot be resumed from; use the run's {LAST}")
        return "it lacks optimizer"
    for name, state in optimizers.items():
        if problem := _differs(state, _OPTIMIZER, name):
            return problem
    processes = content.get("processes", 1)
    if not _fits(processes, int) or not 0 < processes < 2**16:
        return f"its processes is {_short(processes)}"
    for number in range(processes):
        states = checkpoint.subset(tensors, f"rng{number or ''}")
        for name in _RNG:
            if name not in states:
                return f"it lacks rng{number or ''}.{name}"
    return None
