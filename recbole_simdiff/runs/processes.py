"""One run by several processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole.utils import init_seed

from recbole_simdiff import distributed, files
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.data.loaders import BucketLoader, HistoryEvalLoader
from recbole_simdiff.errors import ProcessLost, UserError
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.runs.identity import fingerprint


def check_processes(config: Config, n: int) -> None:
    """Refuse what n processes would not train as one does.

    Args:
        config (Config): resolved configuration.
        n (int): number of processes.

    Raises:
        UserError: naming what can be trained by several, or that they outnumber a batch's rows.
    """
    if n < 1:
        raise UserError(f"--nproc={n} must be at least 1")
    if n == 1:
        return
    able = sorted(name for name, model in plugin_models().items() if model.data_parallel)
    if config.wraps:
        raise UserError(
            f"model={config.name} is trained by one process. To train on its data with several, "
            "write them to a file with the command augment"
        )
    if not config.model_class.data_parallel:
        raise UserError(
            f"model={config.name} is trained by one process: it has no loss whose value on a batch "
            f"is a sum over parts of the batch. Several processes train {', '.join(able)}"
        )
    if config["train_batch_size"] < n:
        raise UserError(
            f"train_batch_size={config['train_batch_size']} cannot be divided among {n} processes: "
            "each needs a row of every batch. Use fewer processes or a larger batch"
        )


@contextmanager
def explained_loss(run_dir: Path) -> Iterator[None]:
    """Within the block, the message of a lost process says how the run goes on.

    Args:
        run_dir (Path): folder of the run.

    Raises:
        ProcessLost: if another process ended.
    """
    try:
        yield
    except ProcessLost as lost:
        if not (run_dir / LAST).is_file():
            raise ProcessLost(
                f"{lost}. There is no {run_dir / LAST}: the run had not begun, unless process 0 "
                "saves it on another host. Begin it again without --resume; --nproc may be another "
                "number"
            ) from lost
        raise ProcessLost(
            f"{lost}. {run_dir / LAST} holds the run as it was when it was last saved. "
            f"Continue with --resume={run_dir} --nproc={distributed.world_size()}, or give the "
            "number of processes that is left: the random states are then drawn anew"
        ) from lost


def join_processes(
    config: Config, dataset: FlatDataset, loaders: tuple[Any, Any, Any], model: Any
) -> None:
    """See that all processes start from the same, and draw numbers of their own from here on.

    Raises:
        UserError: if they differ, or rows cannot be divided among them.
    """
    n, number = distributed.world_size(), distributed.rank()
    check_processes(config, n)
    name = fingerprint(config, files.digest(dataset.histories()))
    if distributed.all_reduce_max(name != distributed.broadcast_text(name)):
        raise UserError(
            "the processes differ in settings, data or version of this package; each host must run "
            "the same command on the same files"
        )
    train, *evaluated = loaders
    if not isinstance(train, BucketLoader):
        raise UserError("the ready-made prefixes of benchmark_filename are read by one process")
    if not all(isinstance(loader, HistoryEvalLoader) for loader in evaluated if loader):
        raise UserError(
            f"eval_args={config['eval_args']}: several processes evaluate on all items only, "
            "mode=full; items drawn by each would not be those that one process draws"
        )
    size = config["train_batch_size"]
    least = len(train.dataset) % size or size
    if least < n:
        raise UserError(
            f"train_batch_size={size} leaves a last batch of {least} of the {len(train.dataset):,} "
            f"training rows, which {n} processes cannot divide. Change it a little"
        )
    steps = [min(len(loader._dataset), loader.step) for loader in evaluated if loader]
    least = min(steps, default=n)
    if least < n:
        raise UserError(
            f"eval_batch_size={config['eval_batch_size']}: {n} processes cannot divide batches of "
            f"{least} to be scored. Use fewer processes or, if there are more rows, a larger value"
        )
    distributed.broadcast_(model.state_dict().values())
    if number > 0:
        config["show_progress"] = False
        init_seed((config["seed"] + number) % 2**32, config["reproducibility"])
