"""The Python interface: the same functions for every model and every pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.pipelines import diffuasr
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.result import RunResult
from recbole_simdiff.runs.run import run_one
from recbole_simdiff.training.progress import Listener

# Method that trains a backbone in several runs -> the function for it, with the arguments of
# ``start``.
PIPELINES = {"DiffuASR": diffuasr.run_stages}


def run(
    model: str, dataset: str, config_files: Sequence[str | Path] = (), **values: Any
) -> RunResult:
    """Train a model on a data set, select on validation, test once, save.

    Args:
        model (str): name of a model of this package or of RecBole, or DiffuASR.
        dataset (str): name of the data set.
        config_files (Sequence): YAML files; later ones override earlier ones.
        **values: settings that override every file, as ``--key=value`` on the command line.

    Returns:
        RunResult: also written to ``result.json`` in the run's folder.

    Raises:
        UserError: if data or settings cannot be used.
        ConnectionError: if a tracked run cannot be opened.
        TrainingDiverged: if a loss becomes NaN or infinite.
        OutOfMemory: if memory runs out.
        Interrupted: after a signal; the state is saved.
    """
    return start(Config(model, dataset, config_files, values))


def resume(location: str | Path, **values: Any) -> RunResult:
    """Continue a stopped run from its next training step.

    Args:
        location (str | Path): a run folder, or its ``last`` checkpoint.
        **values: settings that may change: how long it is trained, where its data are, and what is
            shown.

    Returns:
        RunResult: see ``run``.

    Raises:
        UserError: if the checkpoint cannot be used, or a key may not be given; and as ``run``.
    """
    path = checkpoint.resolve(location, LAST)
    return start(resumed_config(path, values), path)


def start(
    config: Config,
    resume: Path | None = None,
    run_dir: Path | None = None,
    listeners: Sequence[Listener] = (),
    test: bool = True,
) -> RunResult:
    """Train what a configuration describes, in one run or in several.

    Args:
        config (Config): resolved configuration.
        resume (Path | None): a ``last`` checkpoint to continue from; of a pipeline, that of its
            final run.
        run_dir (Path | None): folder of the final run; a new one under ``checkpoint_dir`` by
            default.
        listeners (Sequence): called after every epoch of the final run, and with its result.
        test (bool): False leaves the test part unread, as a hyperparameter search must.

    Returns:
        RunResult: of the final run.

    Raises:
        UserError, ConnectionError, TrainingDiverged, OutOfMemory, Interrupted: as ``run``.
        ProcessLost: if another process of a ``distributed.group`` ended.
    """
    if config.name in PIPELINES:
        return PIPELINES[config.name](config, resume, run_dir, listeners, test)
    return run_one(config, resume, run_dir, listeners=listeners, test=test)
