"""The one way to train a configuration, whether its model is one run or a pipeline of several."""

from collections.abc import Sequence
from pathlib import Path

from recbole_simdiff.config.config import Config
from recbole_simdiff.pipelines import diffuasr
from recbole_simdiff.runs.result import RunResult
from recbole_simdiff.runs.run import run_one
from recbole_simdiff.training.progress import Listener

# Method that trains a backbone in several runs -> what starts it, called as ``start``.
PIPELINES = {"DiffuASR": diffuasr.run_stages}


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
        listeners (Sequence): are called after every epoch of the final run, and of its result.
        test (bool): False leaves the test part unread, as a search over settings must.

    Returns:
        RunResult: of the final run.

    Raises:
        UserError, ConnectionError, TrainingDiverged, OutOfMemory, Interrupted: as ``run_one``.
        ProcessLost: if another process of a ``distributed.group`` ended.
    """
    if config.name in PIPELINES:
        return PIPELINES[config.name](config, resume, run_dir, listeners, test)
    return run_one(config, resume, run_dir, listeners=listeners, test=test)
