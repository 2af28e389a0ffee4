"""Models by name: this package's first, then RecBole's.

Adding a model means adding a file here, a yaml under ``properties/model/`` and a test; there is no
list to extend: every recommender that a file defines is a model.
"""

import contextlib
import difflib
import importlib
import io
import pkgutil
from typing import Any

import recbole.data.dataset as recbole_datasets
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_simdiff.errors import UserError


def plugin_models() -> dict[str, type]:
    """Name -> class of every model in this package."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
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
        "The command 'list' names all of them."
    )


def build_model(config: Any, dataset: Any) -> Any:
    """The model of a configuration for its training data.

    Raises:
        UserError: if a model of RecBole refuses its settings, or reads more of the data than is
            loaded.
    """
    if config["model"] in plugin_models():
        return config.model_class(config, dataset)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # FEARec prints its frequencies
            return config.model_class(config, dataset)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"model={config['model']} cannot be built for dataset={config['dataset']!r}: {error}. "
            f"Columns that it reads, if they are missing, are added to "
            f"load_col={config['load_col']}, those of items under item"
        ) from error
