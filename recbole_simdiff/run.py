"""One training and its test: the only road every command takes."""

import json
import logging
import platform
import resource
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed
from torch import Tensor

from recbole_simdiff import __version__, checkpoint
from recbole_simdiff.config import Config
from recbole_simdiff.data import FlatDataset, Statistics, create_dataset, create_loaders
from recbole_simdiff.errors import UserError
from recbole_simdiff.trainer import (
    BEST,
    PROTOCOLS,
    Metrics,
    PlanTrainer,
    Progress,
    load_model_state,
)

RESULT = "result.json"
# What may differ between a run and its continuation: when it ends, and nothing else in its numbers.
RESUMABLE_KEYS = (
    "epochs",
    "stopping_step",
    "data_path",
    "use_gpu",
    "gpu_id",
    "show_progress",
    "show_users",
)
EVALUATION_KEYS = (
    "data_path",
    "use_gpu",
    "gpu_id",
    "show_progress",
    "eval_batch_size",
    "metrics",
    "topk",
    "valid_metric",
)

logger = logging.getLogger()


@dataclass
class RunResult:
    """What one run found.

    Attributes:
        valid, test (dict): protocol -> metric -> unrounded value, of the best epoch.
        best_epoch (int | None): counted from 0.
        epochs (int): epochs trained.
        seconds (float): of training and validation.
        peak_memory_mb (float): largest resident set of the process, MiB.
        statistics (dict): users, items, actions.
        config (dict): model, dataset and every value.
        versions (dict): of the libraries.
        run_dir (str): folder of the checkpoints.
    """

    valid: dict[str, Metrics]
    test: dict[str, Metrics]
    best_epoch: int | None
    epochs: int
    seconds: float
    peak_memory_mb: float
    statistics: dict[str, int]
    config: dict[str, Any]
    versions: dict[str, str]
    run_dir: str

    def table(self) -> str:
        """Validation and test metrics of both protocols, rounded for reading."""
        digits = self.config["values"]["metric_decimal_place"]
        return format_table({"valid": self.valid, "test": self.test}, digits)


def format_table(results: Mapping[str, dict[str, Metrics]], digits: int = 4) -> str:
    """Rows split x protocol, columns metrics.

    Args:
        results (Mapping): split -> protocol -> metric -> value.
        digits (int): decimals.

    Returns:
        str: an aligned table.
    """
    first = next(metrics for protocols in results.values() for metrics in protocols.values())
    rows = [["split", "protocol", *first]]
    for split, protocols in results.items():
        for protocol, metrics in protocols.items():
            rows.append([split, protocol, *(f"{value:.{digits}f}" for value in metrics.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def run(config: Config, resume: Path | None = None) -> RunResult:
    """Train, select on validation, test once, save.

    Args:
        config (Config): resolved configuration.
        resume (Path | None): a ``last`` checkpoint to continue from.

    Returns:
        RunResult: also written to ``result.json`` in the run's folder.

    Raises:
        UserError: if data, settings or checkpoint cannot be used.
        TrainingDiverged: if a loss becomes NaN or infinite.
        Interrupted: after a signal; the state is saved.
    """
    run_dir = resume.parent if resume else new_run_dir(config)
    start_logging(None, config["state"])
    dataset, train_data, valid_data, test_data, model = prepare(config)
    payload = _payload(config, dataset)
    start_logging(run_dir, config["state"])  # from here on nothing the user typed can be wrong
    logger.info(f"{config['dataset']}: {dataset.statistics}")
    logger.info(
        f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config['device']}, run folder {run_dir}"
    )
    trainer = PlanTrainer(config, model, run_dir, payload, _histories(dataset))
    if resume:
        check_same_data(resume, *checkpoint.load(resume), dataset)
        trainer.resume(resume)
        logger.info(f"resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}")
    with trainer.stoppable():
        progress = trainer.fit(train_data, valid_data, show_progress=config["show_progress"])
        trainer.load_weights(run_dir / BEST)
        results = evaluate_splits(trainer, valid_data, test_data, config["show_progress"])
    result = _result(config, dataset, results, progress, run_dir)
    text = json.dumps({**asdict(result), "log": progress.log}, indent=1)
    checkpoint.write_atomically(run_dir / RESULT, lambda name: Path(name).write_text(text))
    return result


def prepare(config: Config) -> tuple[FlatDataset, Any, Any, Any, Any]:
    """Data set, training, validation and test loader, and the model on its device, all seeded."""
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, test_data = create_loaders(config, dataset)
    if max(config["topk"]) >= dataset.item_num:
        raise UserError(f"topk={config['topk']} exceeds the {dataset.item_num - 1} items there are")
    init_seed(config["seed"], config["reproducibility"])
    model = config.model_class(config, train_data._dataset).to(config["device"])
    return dataset, train_data, valid_data, test_data, model


def evaluate_splits(
    trainer: PlanTrainer, valid_data: Any, test_data: Any, show_progress: bool
) -> dict[str, dict[str, Metrics]]:
    """Both splits under both protocols: split -> protocol -> metric -> value."""
    return {
        name: trainer.evaluate_protocols(data, PROTOCOLS, show_progress)
        for name, data in (("valid", valid_data), ("test", test_data))
        if data
    }


def evaluate(place: str | Path, overrides: Mapping[str, Any] | None = None) -> RunResult:
    """Evaluate a checkpoint on the validation and test parts of its data set.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        overrides (Mapping | None): of ``EVALUATION_KEYS``.

    Returns:
        RunResult: the run's folder is left as it is.

    Raises:
        UserError: if checkpoint or data cannot be used, or they do not belong together.
    """
    path = checkpoint.find(place, BEST)
    tensors, content = checkpoint.load(path)
    config = stored_config(content, overrides or {}, EVALUATION_KEYS)
    start_logging(None, config["state"])
    dataset, train_data, valid_data, test_data, model = prepare(config)
    logger.info(f"{config['dataset']}: {dataset.statistics}")
    check_same_data(path, tensors, content, dataset)
    load_model_state(model, checkpoint.split(tensors, "model"), path)
    trainer = PlanTrainer(config, model, path.parent)
    trainer.eval_collector.data_collect(train_data)
    results = evaluate_splits(trainer, valid_data, test_data, config["show_progress"])
    progress = Progress(**content["progress"])
    return _result(config, dataset, results, progress, path.parent)


def _result(
    config: Config,
    dataset: FlatDataset,
    results: dict[str, dict[str, Metrics]],
    progress: Progress,
    run_dir: Path,
) -> RunResult:
    return RunResult(
        valid=results.get("valid", {}),
        test=results.get("test", {}),
        best_epoch=progress.best_epoch,
        epochs=len(progress.log),
        seconds=progress.seconds,
        peak_memory_mb=peak_memory_mb(),
        statistics=asdict(dataset.statistics),
        config=config.plain(),
        versions=versions(),
        run_dir=str(run_dir),
    )


def stored_config(
    content: Mapping[str, Any], overrides: Mapping[str, Any], allowed: Sequence[str]
) -> Config:
    """The configuration a checkpoint was made with, with a few values replaced.

    Args:
        content (Mapping): JSON content of the checkpoint.
        overrides (Mapping): values to replace.
        allowed (Sequence): keys that may be replaced.

    Raises:
        UserError: for a key that may not be.
    """
    for key in overrides:
        if key not in allowed:
            raise UserError(
                f"--{key} cannot be changed here: the checkpoint fixes it. Allowed: "
                f"{', '.join(allowed)}"
            )
    stored = content["config"]
    values = {**stored["values"], **overrides}
    return Config(stored["model"], stored["dataset"], overrides=values, origin="checkpoint")


def check_same_data(
    path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any], dataset: FlatDataset
) -> None:
    """Refuse data that are not the checkpoint's: other items, users, or order of events.

    Args:
        path (Path): the checkpoint, for the message.
        tensors (Mapping): its tensors.
        content (Mapping): its JSON content.
        dataset (FlatDataset): the data set about to be used.

    Raises:
        UserError: if they differ.
    """
    stored = checkpoint.split(tensors, "data")
    same = content["items"] == item_ids(dataset) and content["users"] == user_ids(dataset)
    if not same or any(not torch.equal(v, stored[k]) for k, v in _histories(dataset).items()):
        raise UserError(
            f"the data set {dataset.dataset_name!r} at {dataset.dataset_path} is not the one "
            f"{path} was trained on: it has {dataset.statistics}, the checkpoint "
            f"{Statistics(**content['statistics'])}; or its events come in another order"
        )


def item_ids(dataset: FlatDataset) -> list[str]:
    """Raw item ids by number; number 0 is padding."""
    return [str(token) for token in dataset.field2id_token[dataset.iid_field]]


def user_ids(dataset: FlatDataset) -> list[str]:
    """Raw user ids by number; number 0 is padding."""
    return [str(token) for token in dataset.field2id_token[dataset.uid_field]]


def _payload(config: Config, dataset: FlatDataset) -> dict[str, Any]:
    return {
        "config": config.plain(),
        "versions": versions(),
        "statistics": asdict(dataset.statistics),
        "items": item_ids(dataset),
        "users": user_ids(dataset),
        "titles": dataset.item_titles(),
    }


def _histories(dataset: FlatDataset) -> dict[str, Tensor]:
    """All interactions of each user in order, so that a checkpoint alone can recommend to them."""
    if not dataset.list_fields:
        return {}
    counts = torch.bincount(dataset.flat[dataset.uid_field], minlength=dataset.user_num)
    ends = counts.cumsum(0)
    return {"history_items": dataset.flat[dataset.iid_field].int(), "history_ends": ends}


def new_run_dir(config: Config) -> Path:
    """A fresh folder name under ``checkpoint_dir``; parallel runs never meet."""
    name = f"{config.model}-{config['dataset']}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(config["checkpoint_dir"]) / f"{name}-{secrets.token_hex(2)}"


def start_logging(run_dir: Path | None, level: str = "INFO") -> None:
    """Log to the terminal and, with a run folder, to ``<run>.log`` in it."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(run_dir / f"{run_dir.name}.log"))
    logging.basicConfig(level=level.upper(), format="%(message)s", handlers=handlers, force=True)


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions that shape the numbers."""
    libraries = {name: version(name) for name in ("recbole", "torch", "numpy", "pandas")}
    return {"recbole_simdiff": __version__, "python": platform.python_version(), **libraries}
