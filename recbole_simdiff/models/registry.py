"""Models by name: this package's first, then RecBole's.

Adding a model means adding a file here, a yaml under ``properties/model/`` and a test; there is no
list to extend: every recommender that a file defines is a model.
"""

import contextlib
import difflib
import importlib
import io
import math
import os
import pkgutil
import traceback
from pathlib import Path
from typing import Any

import recbole.data.dataset as recbole_datasets
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_simdiff.errors import UserError

# Operations that make a tensor of the size they are given.
_MAKING = {f"aten::{name}" for name in ("empty", "zeros", "ones", "full", "rand", "randn")}


def plugin_models() -> dict[str, type]:
    """Name -> class of every model in this package."""
    found = {}
    package = importlib.import_module("recbole_simdiff.models")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            is_model = isinstance(value, type) and issubclass(value, SequentialRecommender)
            if is_model and value.__module__ == module.__name__:
                found[name] = value
    return found


def recbole_models() -> dict[str, type]:
    """Name -> class of RecBole's own sequential models."""
    package = importlib.import_module("recbole.model.sequential_recommender")
    modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
    return {
        name: value
        for name, value in vars(package).items()
        if isinstance(value, type) and name.lower() in modules
    }


def needed_data_set(model: str) -> str | None:
    """The data set class of its own that a model of RecBole needs; such models are refused."""
    name = f"{model}Dataset"
    return name if hasattr(recbole_datasets, name) else None


def available_models() -> list[str]:
    """Names of all models, this package's first."""
    return [*sorted(plugin_models()), *sorted(recbole_models())]


def get_model(name: str) -> Any:
    """The model class of that name.

    Raises:
        UserError: if there is none, with the nearest names.
    """
    models = {**recbole_models(), **plugin_models()}
    if name in models:
        return models[name]
    by_lower = {known.lower(): known for known in models}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(by_lower[n] for n in near)}?" if near else ""
    raise UserError(
        f"model={name!r} is not a sequential model of recbole_simdiff or RecBole.{hint} "
        "The command 'list' names all of them.",
        keys=("model",),
    )


def build_model(config: Any, dataset: Any) -> Any:
    """The model of a configuration for its training data.

    Raises:
        UserError: if a model of RecBole refuses its settings, or reads more of the data than is
            loaded; if the model is larger than the memory of this machine.
    """
    _check_features(config, dataset)
    try:
        with _MemoryLimit():
            if config["model"] in plugin_models():
                return config.model_class(config, dataset)
            return _build_recbole(config, dataset)
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


def _build_recbole(config: Any, dataset: Any) -> Any:
    """A model of RecBole, whose code does not say which setting it cannot use."""
    n_items = dataset.item_num - 1
    if config["reranker_CAN_NUM"] and config["reranker_CAN_NUM"] > n_items:
        raise UserError(
            f"reranker_CAN_NUM={config['reranker_CAN_NUM']} candidates must not exceed the "
            f"{n_items} items there are",
            keys=("reranker_CAN_NUM",),
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # FEARec prints its frequencies
            return config.model_class(config, dataset)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model={config['model']} cannot be built for dataset={config['dataset']!r}: {error}. "
            f"Columns that it reads, if they are missing, are added to "
            f"load_col={config['load_col']}, those of items under item",
            keys=("model", "dataset", "load_col"),
        ) from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
    ) as error:
        (*_, place) = traceback.extract_tb(error.__traceback__)
        reason = str(error) or f"a condition of {Path(place.filename).name}, line {place.lineno}"
        raise UserError(
            f"model={config['model']} cannot be built of its settings: {reason}. "
            f"'list --explain --model={config['model']}' shows them",
            keys=("model",),
        ) from error


def _check_features(config: Any, dataset: Any) -> None:
    """Refuse columns of items that would take no part in a model of RecBole.

    Its models pass over columns of numbers that are not among ``numerical_features``, without a
    word; S3Rec reads numbers as no attributes.

    Raises:
        UserError: naming the column and the key that would make it work.
    """
    for key in ("selected_features", "item_attribute"):
        if key not in config:
            continue
        names = config[key] if isinstance(config[key], list) else [config[key]]
        if not names:
            raise UserError(f"{key}={names} must name a column of the .item file", keys=(key,))
        for name in names:
            reason, *others = _no_feature(config, dataset, name)
            if reason:
                raise UserError(
                    f"{key}={config[key]}: {name} would take no part: {reason}",
                    keys=(key, *others),
                )


def _no_feature(config: Any, dataset: Any, name: str) -> tuple[str, ...]:
    """Why a column cannot be a feature of items, '' if it can; and the keys that this names."""
    model = config["model"]
    if name not in dataset.field2type or dataset.item_feat is None:
        return f"it is not loaded. Add it to load_col={config['load_col']}, under item", "load_col"
    if name not in dataset.item_feat:
        return (
            "it is no column of the .item file, which alone has features of items; "
            f"load_col={config['load_col']}",
            "load_col",
        )
    kind = dataset.field2type[name].value
    if "float" not in kind:
        return ("",)
    if model == "S3Rec":
        return (f"it is {kind}, and attributes are token or token_seq",)
    if name not in config["numerical_features"]:
        return (
            f"it is {kind}, and numbers are features only if "
            f"numerical_features={config['numerical_features']} names them, too",
            "numerical_features",
        )
    if model == "SASRecF" and kind == "float_seq":
        return (f"RecBole's SASRecF cannot take {kind}; GRU4RecF and FDSA can",)
    return ("",)


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
