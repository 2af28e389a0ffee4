"""What a result says about how it was made, and the comparison of a result with a repetition."""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recbole_simdiff.config.config import COMMAND_LINE, Config
from recbole_simdiff.config.keys import NOT_IN_RESULT
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.identity import source_checksum
from recbole_simdiff.runs.restore import stored_config
from recbole_simdiff.runs.result import RunResult

PACKAGE = Path(__file__).parents[1]
# Keys with the path of a file or run that a repetition must read again.
FILES = ("item_table", "item_vectors", "init_from", "epochs_from")
# Of a repetition: nothing is reported to a tracking server.
UNTRACKED = {"log_wandb": False, "log_mlflow": False}


def describe_run(config: Config, processes: int = 1) -> dict[str, Any]:
    """The record of a run, as JSON can hold it: ``RunResult.record``.

    It has no name of a user or a machine, and no path beyond those of the configuration.

    Args:
        config (Config): resolved configuration; its data files are there.
        processes (int): how many train together.

    Returns:
        dict: ``command`` (arguments that train the same), ``git`` (see ``git_state``), ``source``
        (checksum of the package's definitions), ``data`` (checksum of the data files), ``seed``,
        and ``host`` (``cores``, ``threads`` of torch, ``platform``, ``gpu``).
    """
    gpu = torch.cuda.get_device_name(config["device"]) if config["device"].type == "cuda" else None
    return {
        "command": train_arguments(config, processes),
        "git": _own_git_state(),
        "source": source_checksum(),
        "data": data_checksum(config),
        "seed": config["seed"],
        "host": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "platform": f"{platform.system()} {platform.machine()}",
            "gpu": gpu,
        },
    }


def train_arguments(config: Config, processes: int = 1) -> list[str]:
    """Arguments of ``train`` for the same run: every value that differs from its default.

    Args:
        config (Config): resolved configuration.
        processes (int): how many train together.
    """
    plain, trained = config.plain(), config.model_class.__name__
    if config.own and config.own.reference:
        trained = Path(config.own.reference).name  # FILE.py:CLASS
    default = _defaults(config)
    changed = {k: v for k, v in plain["values"].items() if k not in default or default[k] != v}
    if config.wraps:
        changed["backbone"] = trained
    model = config.name if config.wraps else trained
    arguments = [f"--model={model}", f"--dataset={config.dataset}"]
    arguments += [f"--{k}={_typed(v)}" for k, v in changed.items()]
    return ["train", *arguments, *([f"--nproc={processes}"] if processes > 1 else [])]


def _defaults(config: Config) -> dict[str, Any]:
    """Values of the same model and data set where nothing is given; empty if something must be."""
    backbone = {"backbone": config.model_class} if config.wraps else {}
    model = config.name if config.wraps else config.model_class
    try:
        values: dict[str, Any] = Config(model, config.dataset, (), backbone).plain()["values"]
    except UserError:
        return {}
    return values


def _typed(value: Any) -> str:
    """A value as it is typed on the command line, where it is read as YAML."""
    plain = (
        isinstance(value, str)
        and (value[:1].isalpha() or value[:1] == "/")
        and value == value.strip()
        and set(value).isdisjoint(":#{}[],'\"")
    )
    if plain and value.lower() not in ("true", "false", "yes", "no", "on", "off", "null", "none"):
        return str(value)
    return json.dumps(value)


def git_state(package: Path = PACKAGE) -> dict[str, Any]:
    """Commit of the package's source, if it is part of a clone; empty if it is not.

    Args:
        package (Path): folder of the source.

    Returns:
        dict: ``commit``, and ``changed``, whether files of the package differ from it.
    """
    # A package that is installed inside somebody's project is not part of that project.
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return {}
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".", "../properties")
    if commit is None or changed is None:
        return {}
    return {"commit": commit.strip(), "changed": bool(changed.strip())}


@cache
def _own_git_state() -> dict[str, Any]:
    """That of this package when a process first asks: later changes are not what it runs."""
    return git_state()


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if it fails or there is no git."""
    command = [
        "git",
        "--no-optional-locks",
        "-c",
        "core.fsmonitor=false",
        "-C",
        str(folder),
        *arguments,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def data_checksum(config: Config) -> str:
    """Checksum of the atomic files of a data set, 16 hexadecimal digits.

    Args:
        config (Config): resolved configuration.
    """
    total = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*")):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# ---------------------------------------------------------------------- repetition


def repeated_config(result: RunResult, overrides: Mapping[str, Any]) -> Config:
    """The configuration that trains a finished run again.

    Args:
        result (RunResult): the finished run.
        overrides (Mapping): of keys that do not change what a run computes, such as ``data_path``.

    Raises:
        UserError: for another key, or a run of several processes.
    """
    if result.processes > 1:
        command = " ".join(result.record.get("command", ["train"]))
        raise UserError(
            f"the run was trained by {result.processes} processes, and a repetition here by one "
            f"would give other numbers; start it with: {command}"
        )
    for key in overrides:
        if key not in NOT_IN_RESULT:
            raise UserError(
                f"{key} cannot be changed here: it shapes the numbers that are compared. Allowed: "
                f"{', '.join(sorted(NOT_IN_RESULT))}"
            )
    values = result.config["values"]
    read_again = {key: values[key] for key in FILES if values.get(key) is not None}
    untracked = {key: value for key, value in UNTRACKED.items() if key in values}
    given = {**read_again, **untracked, **overrides}
    return stored_config({"config": result.config}, given, tuple(given), COMMAND_LINE)


class Figure(NamedTuple):
    """A number of a run and of its repetition.

    Attributes:
        name (str): what it is, such as ``test, history kept, ndcg@10``.
        before, after (float): of the run and of the repetition; NaN where one lacks it.
    """

    name: str
    before: float
    after: float

    @property
    def equal(self) -> bool:
        """Whether both are the same number, to the last bit."""
        return self.before == self.after


def figures(before: RunResult, after: RunResult) -> list[Figure]:
    """Every number that a repetition must give again: metrics of both splits, and epochs.

    Args:
        before (RunResult): the run.
        after (RunResult): its repetition.
    """
    first, second = dict(_numbers(before)), dict(_numbers(after))
    names = [*first, *(name for name in second if name not in first)]
    return [Figure(n, first.get(n, math.nan), second.get(n, math.nan)) for n in names]


def _numbers(result: RunResult) -> Iterator[tuple[str, float]]:
    for split, protocols in (("valid", result.valid), ("test", result.test)):
        for protocol, metrics in protocols.items():
            yield from ((f"{split}, {protocol}, {name}", v) for name, v in metrics.items())
    yield "epochs", result.epochs
    yield "best epoch", -1 if result.best_epoch is None else result.best_epoch


def circumstances(before: RunResult, after: RunResult) -> list[str]:
    """What differs in data, code, versions and host of two results, one text each."""
    first, second = dict(_circumstances(before)), dict(_circumstances(after))
    return [
        f"{name}: {first[name]}, now {second[name]}"
        for name in first
        if name in second and first[name] != second[name]
    ]


def _circumstances(result: RunResult) -> Iterator[tuple[str, Any]]:
    record = result.record
    for key, name in (("data", "checksum of the data"), ("source", "checksum of the package")):
        if key in record:
            yield name, record[key]
    yield from ((f"version of {name}", version) for name, version in result.versions.items())
    yield from record.get("host", {}).items()
