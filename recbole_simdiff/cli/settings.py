"""The configuration that a command's arguments describe."""

import argparse
from typing import Any

from recbole_simdiff.cli.parser import DEFAULTS
from recbole_simdiff.config.config import COMMAND_LINE, Config
from recbole_simdiff.config.layers import read_yaml


def config_files(namespace: argparse.Namespace) -> list[str]:
    """The files of ``--config_files``; they may also be separated by commas."""
    return [part for text in namespace.config_files for part in text.split(",") if part]


def command_config(namespace: argparse.Namespace, overrides: dict[str, Any]) -> Config:
    """The configuration of a command's arguments.

    Args:
        namespace (Namespace): parsed arguments.
        overrides (dict): other ``--key=value``.

    Raises:
        UserError: if the configuration is impossible.
    """
    files = config_files(namespace)
    from_files: dict[str, Any] = {}
    for file in files:
        from_files |= {key: value for key, value in read_yaml(file).items() if key in DEFAULTS}
    model, dataset = (getattr(namespace, k) or from_files.get(k) or DEFAULTS[k] for k in DEFAULTS)
    return Config(model, dataset, files, overrides, COMMAND_LINE)
