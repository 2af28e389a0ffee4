"""What a result is named after: settings, data and code."""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import naming
from recbole_simdiff.data.item_vectors import vectors_checksum
from recbole_simdiff.files import outline
from recbole_simdiff.runs.best_epochs import epoch_scores
from recbole_simdiff.runs.item_table import table_checksum
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.runs.warm_start import start_checksum

UNHASHED = (  # of results
    "experiments/",
    "tuning/",
    "cli/",
    "serving/",
    "data/prepare.py",
    "data/raw_formats.py",
    "training/tracking.py",
    "runs/record.py",
    "runs/estimate.py",
)


def fingerprint(config: Config, data: str) -> str:
    """A short name of a run's result: of all settings that shape it, the data and the code.

    The content of files and other runs that it begins with counts, too.

    Args:
        config (Config): resolved configuration.
        data (str): checksum of the data.
    """
    named = config.identity() | {"data": data, "code": source_checksum()}
    return digest_of(named | contents(config))


def contents(config: Config) -> dict[str, Any]:
    """What a result depends on besides settings, data and package, by name.

    That is the code of an own model, and the content of files and runs that settings name.

    Args:
        config (Config): resolved configuration.

    Raises:
        UserError: if a run that is named cannot be used.
    """
    code = {"own_model": config.own.checksum} if config.own else {}
    read = table_checksum(config) | start_checksum(config) | epoch_scores(config)
    return code | read | vectors_checksum(config) | _baseline_checksum(config)


def _baseline_checksum(config: Config) -> dict[str, str]:
    """What ``baseline_checkpoint`` adds: a checksum of its settings, items and weights, or nothing.

    Raises:
        UserError: if there is no usable checkpoint.
    """
    if "baseline_checkpoint" not in config or config["baseline_checkpoint"] is None:
        return {}
    tensors, content = load_run(checkpoint.resolve(config["baseline_checkpoint"], BEST))
    read = {"config": naming(content["config"]), "items": content["items"]}
    weights = files.digest(checkpoint.subset(tensors, "model"))
    return {"baseline_checkpoint": digest_of(read | {"weights": weights})}


@cache
def source_checksum(package: Path = Path(__file__).parents[1]) -> str:
    """Checksum of the package's definitions, but for those that only read results.

    In which file a definition stands does not count, nor do imports, docstrings, comments and
    formatting, so that stored results outlive a change of layout.

    Args:
        package (Path): folder of the source.
    """
    outlines: list[str] = []
    for path in package.rglob("*.py"):
        if not path.relative_to(package).as_posix().startswith(UNHASHED):
            outlines += filter(None, map(outline, ast.parse(path.read_text()).body))
    return hashlib.blake2b("\n".join(sorted(outlines)).encode(), digest_size=8).hexdigest()


def digest_of(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for a set of JSON-ready values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
