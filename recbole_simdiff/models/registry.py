"""Models by name: this package's, the user's own, RecBole's.

Adding a model to this package means adding a file here, a yaml under ``properties/model/`` and a
test; there is no list to extend: every ``SequentialModel`` that a file defines is a model.
"""

import difflib
import importlib
import math
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recbole.data.dataset as recbole_datasets
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_simdiff.errors import UserError
from recbole_simdiff.models import own
from recbole_simdiff.models.diffuasr import generator
from recbole_simdiff.models.recbole import RecBoleModel, adapted, build_recbole
from recbole_simdiff.modules.base import SequentialModel

# Operations that make a tensor of the size they are given.
_MAKING = {f"aten::{name}" for name in ("empty", "zeros", "ones", "full", "rand", "randn")}


# Method that trains another model, its ``backbone``, in several runs -> the check of its settings.
WRAPPERS = {"DiffuASR": generator.check_config}


def plugin_models() -> dict[str, type[SequentialModel]]:
    """Name -> class of every model in this package."""
    models: dict[str, type[SequentialModel]] = {}
    package = importlib.import_module("recbole_simdiff.models")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            if not isinstance(value, type) or not issubclass(value, SequentialModel):
                continue
            if value.__module__ == module.__name__ and not issubclass(value, RecBoleModel):
                models[name] = value
    return models


def recbole_models() -> dict[str, type[RecBoleModel]]:
    """Name -> class of RecBole's own sequential models, under the contract of this package's."""
    package = importlib.import_module("recbole.model.sequential_recommender")
    modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
    return {
        name: adapted(value)
        for name, value in vars(package).items()
        if isinstance(value, type) and name.lower() in modules
    }


def needed_data_set(model: str) -> str | None:
    """The data set class of its own that a model of RecBole needs; such models are refused."""
    name = f"{model}Dataset"
    return name if hasattr(recbole_datasets, name) else None


def available_models() -> list[str]:
    """Names of all models: this package's, those of installed packages, RecBole's."""
    return [*sorted(plugin_models()), *sorted(own.installed()), *sorted(recbole_models())]


def get_model(name: str | type) -> type[SequentialModel]:
    """The model class of that name.

    Args:
        name (str | type): of a model of this package, of RecBole or of an installed package;
            ``FILE.py:CLASS``, whose code is run; or a class.

    Raises:
        UserError: if there is none, with the nearest names; or if it cannot be used.
    """
    models: dict[str, type[SequentialModel]] = {**recbole_models(), **plugin_models()}
    if isinstance(name, type):
        same = models.get(name.__name__)
        if same is not None and issubclass(same, name):
            return same
        return _new(own.add(name), models)
    if name.endswith(".py"):
        there = ", ".join(f"{name}:{one.name}" for one in own.add_file(name))
        raise UserError(f"model={name} must name a class of the file: {there}", keys=("model",))
    if own.is_file(name):
        (new,) = own.add_file(name)
        return _new(new, models)
    if name in models:
        return models[name]
    if own_model := own.known(name):
        return _adapted(own_model)
    by_lower = {known.lower(): known for known in (*own.installed(), *models)}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(by_lower[n] for n in near)}?" if near else ""
    raise UserError(
        f"model={name!r} is not a sequential model of recbole_simdiff or RecBole.{hint} "
        "The command 'list' names all of them.",
        keys=("model",),
    )


def accept(model: str | Path | type | None) -> None:
    """Make a model of the user's own known, so that a checkpoint of it can be used.

    Args:
        model (str | Path | type | None): the class; or its ``FILE.py``, whose code is run; None for
            nothing.

    Raises:
        UserError: as ``get_model``.
    """
    model = str(model) if isinstance(model, Path) else model
    if isinstance(model, str) and not own.is_file(model):
        raise UserError(f"the file of a model of your own ends in .py; {model!r} does not")
    if isinstance(model, str):
        for own_model in own.add_file(model):
            _new(own_model, {**recbole_models(), **plugin_models()})
    elif model is not None:
        get_model(model)


def _new(own_model: own.OwnModel, models: Mapping[str, type]) -> type[SequentialModel]:
    """The class of an own model, whose name must be new: tables and folders go by it."""
    if own_model.name in models or own_model.name in WRAPPERS:
        raise UserError(
            f"model={own_model.name} ({own_model.place}): this package or RecBole has a model of "
            "that name; give the class another one",
            keys=("model",),
        )
    return _adapted(own_model)


def _adapted(own_model: own.OwnModel) -> type[SequentialModel]:
    """The class of an own model under the contract."""
    return (
        own_model.model
        if issubclass(own_model.model, SequentialModel)
        else adapted(own_model.model)
    )


def build_model(config: Any, dataset: Any) -> SequentialModel:
    """The model of a configuration for its training data.

    Raises:
        UserError: if a model of RecBole refuses its settings, or reads more of the data than is
            loaded; if the model is larger than the memory of this machine.
    """
    try:
        with _MemoryLimit():
            if issubclass(config.model_class, RecBoleModel) and not config.own:
                return build_recbole(config, dataset)
            model: SequentialModel = config.model_class(config, dataset)
            return model
    except _TooLarge as error:
        widths = ("hidden_size", "embedding_size", "inner_size", "n_layers")
        sizes = [key for key in (*widths, "MAX_ITEM_LIST_LENGTH") if key in config]
        named = ", ".join(f"{key}={config[key]}" for key in sizes)
        raise UserError(
            f"model={config['model']} for dataset={config['dataset']!r} needs {error} GiB or more "
            f"for its weights; this machine has {_memory() / 2**30:.1f}. Choose smaller sizes: "
            f"{named}",
            keys=("model", "dataset", *sizes),
        ) from None


class _TooLarge(Exception):
    """More memory is asked for than there is; the message is how much, in GiB."""


class _MemoryLimit(TorchDispatchMode):
    """Within the block, new tensors may take as much memory together as the machine has.

    Without it, sizes beyond that end in an error of the allocator or, where the system promises
    memory that it does not have, in a killed process.
    """

    def __init__(self) -> None:
        super().__init__()
        self._total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what is made before it is."""
        size = 0
        if func._schema.name in _MAKING:
            kind = (kwargs or {}).get("dtype") or torch.get_default_dtype()
            size = math.prod(args[0]) * kind.itemsize
        elif func._schema.name == "aten::clone":  # layers may be copies of the first one
            size = args[0].numel() * args[0].itemsize
        if size:
            self._total += size
            if self._total > _memory():
                raise _TooLarge(f"{self._total / 2**30:,.1f}")
        return func(*args, **(kwargs or {}))


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
