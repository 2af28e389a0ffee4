"""The command that lists models, data sets, presets and values."""

import argparse
from typing import Any

from recbole_simdiff.cli.parser import DEFAULTS, add_model_arguments
from recbole_simdiff.cli.settings import command_config
from recbole_simdiff.config.layers import preset_files, properties_dir
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.own import installed
from recbole_simdiff.models.registry import WRAPPERS, needed_data_set, plugin_models, recbole_models


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``list``."""
    add_model_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="every value and where it is set")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """List models, data sets and presets, or every value of a configuration and its origin."""
    if namespace.explain:
        rows = command_config(namespace, overrides).explain()
        width = max(len(key) for key, _, _ in rows)
        for key, value, origin in rows:
            print(f"{key.ljust(width)}  {value!s:<32}  {origin}")
        return 0
    given = [key for key in (*DEFAULTS, "config_files") if getattr(namespace, key)]
    if given or overrides:
        raise UserError(f"--{[*given, *overrides][0]} needs --explain with this command")
    models = plugin_models()
    trainable = sorted(name for name in recbole_models() if needed_data_set(name) is None)
    print("models:           ", ", ".join(sorted(models)))
    print("RecBole's models: ", ", ".join(trainable))
    if installed():
        print("installed models: ", ", ".join(sorted(installed())))
    print(
        "data sets with settings here:",
        ", ".join(p.stem for p in sorted((properties_dir() / "dataset").glob("*"))),
    )
    for name in WRAPPERS:
        print(f"augmented data:    {name}, for any of them: --model={name} --backbone=NAME")
    lineages = {name: [base.__name__ for base in models[name].__mro__] for name in sorted(models)}
    for model, names in (lineages | {name: [name] for name in WRAPPERS}).items():
        print(f"presets of {model}: {', '.join(['paper', *sorted(preset_files(names))])}")
    return 0
