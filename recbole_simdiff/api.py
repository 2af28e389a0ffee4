"""The front door from Python: one road for every model and every pipeline."""

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

# Method that trains a backbone in several runs -> what starts it, called as ``start``.
PIPELINES = {"DiffuASR": diffuasr.run_stages}


def run(
    model: str, dataset: str, config_files: Sequence[str | Path] = (), **values: Any
) -> RunResult:
    """Train a model on a data set, select on validation, test once, save.

    Args:
        model (str): name of a model of this package or of RecBole, or DiffuASR.
        dataset (str): name of the data set.
        config_files (Sequence): YAML files, later ones win.
        **values: settings that win over every file, as ``--key=value`` on the command line.

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


def resume(place: str | Path, **values: Any) -> RunResult:
    """Go on with a stopped run, from the step that was not taken.

    Args:
        place (str | Path): a run folder, or its ``last`` checkpoint.
        **values: settings that may differ: how long it is trained, where its data are, and what is
            shown.

    Returns:
        RunResult: see ``run``.

    Raises:
        UserError: if the checkpoint cannot be used, or a key may not be given; and as ``run``.
    """
    path = checkpoint.resolve(place, LAST)
    return start(resumed_config(path, values), path)


def start(
    config: Config,
    resume: Path | None = None,
    run_dir: Path | None = None,
    listeners: Sequence[Listener] = (),
    test: bool = True,
) -> RunResult:
    """The training that a configuration asks for, of one run or of several.

    Args:
        config (Config): resolved configuration.
        resume (Path | None): a ``last`` checkpoint to continue from, of a pipeline's final run.
        run_dir (Path | None): folder of the final run; a fresh one under ``checkpoint_dir`` by
            default.
        listeners (Sequence): are told of every epoch of the final run, and of its result.
        test (bool): False leaves the test part unread, as a search over settings must.

    Returns:
        RunResult: of the final run.

    Raises:
        UserError, ConnectionError, TrainingDiverged, OutOfMemory, Interrupted: as ``run``.
        ProcessLost: if another process of a ``distributed.group`` ended.
    """
    if config.name in PIPELINES:
        return PIPELINES[config.name](config, resume, run_dir, listeners, test)
    return run_one(config, resume, run_dir, listeners=listeners, test=test)
