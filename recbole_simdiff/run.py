"""One training and its test: the only road every command takes."""

import ast
import hashlib
import json
import logging
import platform
import resource
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from recbole.utils import init_seed
from torch import Tensor

from recbole_simdiff import __version__, checkpoint, distributed, tracking
from recbole_simdiff.config import AUGMENTED, CHECKPOINT, OVERRIDES, Config
from recbole_simdiff.data import (
    BucketLoader,
    FlatDataset,
    HistoryEvalLoader,
    create_dataset,
    create_loaders,
)
from recbole_simdiff.errors import UserError, telling_memory
from recbole_simdiff.models import build_model, plugin_models
from recbole_simdiff.stored import load_run
from recbole_simdiff.trainer import (
    BEST,
    KEPT,
    LAST,
    PROTOCOLS,
    Metrics,
    PlanTrainer,
    Progress,
    check_tensorboard,
    load_model_state,
    protocol_name,
)

RESULT = "result.json"
# Of a result, what is sent to trackers.
TRACKED = ("valid", "test", "best_epoch", "seconds", "peak_memory_mb", "peak_gpu_memory_mb")
RANKS, LISTS = "ranks.csv", "lists.csv.gz"
PSEUDO = "data.pseudo"  # invented items of each user, in the checkpoint of a run on augmented data
READERS = ("experiments", "cli.py", "inference.py", "prepare.py", "tracking.py")  # of results
# What may differ between a run and its continuation: when it ends, and nothing else in its numbers.
RESUMABLE_KEYS = (
    "epochs",
    "stopping_step",
    "stopping_updates",
    "data_path",
    "use_gpu",
    "gpu_id",
    "show_progress",
    "show_users",
    "log_wandb",
    "wandb_project",
    "log_mlflow",
    "mlflow_experiment",
)
EVALUATION_KEYS = (
    "data_path",
    "use_gpu",
    "gpu_id",
    "show_progress",
    "eval_batch_size",
    "metrics",
    "topk",
    "tail_ratio",
    "valid_metric",
    "length_groups",
    "save_rankings",
)
# Keys that change where a run happens or what is shown, not what it computes.
ELSEWHERE_KEYS = {
    "data_path",
    "use_gpu",
    "gpu_id",
    "show_progress",
    "eval_batch_size",
    "checkpoint_dir",
    "augmentation_cache",
    "show_users",
    "save_rankings",
    "state",
    "metric_decimal_place",
    "item_title_field",
    "worker",
    "log_wandb",
    "wandb_project",
    "log_mlflow",
    "mlflow_experiment",
}

logger = logging.getLogger()


@dataclass
class RunResult:
    """What one run found.

    Attributes:
        valid, test (dict): protocol -> metric -> unrounded value, of the best epoch. The name of a
            protocol says which candidates are drawn, see ``protocol_name``.
        best_epoch (int | None): counted from 0.
        epochs (int): epochs trained.
        seconds (float): of training and validation.
        peak_memory_mb (float): largest resident set of the process, MiB; of the first one, if the
            run had several.
        statistics (dict): users, items, actions.
        config (dict): model, dataset and every value.
        versions (dict): of the libraries.
        run_dir (str): folder of the checkpoints.
        tested (bool): whether the test part was read; in a search it is not.
        by_length (dict): input length, such as "6-20", -> test metrics with the history kept, and
            ``rows``, how many there are.
        sampling (dict): for models that draw when they score: metric -> mean and standard deviation
            of the test metric, history kept, over ``seeds`` sampling seeds.
        augmentation (dict): for DiffuASR, what its earlier stages found.
        processes (int): how many trained together.
        peak_gpu_memory_mb (float): most memory that tensors of this process took on a GPU, MiB; 0
            without one.
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
    tested: bool = True
    by_length: dict[str, Metrics] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    peak_gpu_memory_mb: float = 0.0

    @property
    def digits(self) -> int:
        """Decimals in tables."""
        return int(self.config["values"]["metric_decimal_place"])

    def table(self) -> str:
        """Validation and test metrics of both protocols, rounded for reading."""
        if not self.valid and not self.test:
            return "nothing was validated or tested"
        return format_table({"valid": self.valid, "test": self.test}, self.digits)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Rows of cells as text, the first ``left`` columns aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def format_table(
    results: Mapping[str, Mapping[str, Metrics]],
    digits: int = 4,
    names: tuple[str, str] = ("split", "protocol"),
) -> str:
    """Rows split x protocol, columns metrics.

    Args:
        results (Mapping): split -> protocol -> metric -> value.
        digits (int): decimals.
        names (tuple): headings of the first two columns.

    Returns:
        str: an aligned table.
    """
    first = next(metrics for protocols in results.values() for metrics in protocols.values())
    rows = [[*names, *first]]
    for split, protocols in results.items():
        for protocol, metrics in protocols.items():
            rows.append([split, protocol, *(f"{value:.{digits}f}" for value in metrics.values())])
    return aligned(rows, 2)


def run(
    config: Config,
    resume: Path | None = None,
    run_dir: Path | None = None,
    pseudo: Tensor | None = None,
    augmentation: dict[str, Any] | None = None,
    report: Callable[[Progress], None] | None = None,
    test: bool = True,
) -> RunResult:
    """Train, select on validation, test once, save.

    Args:
        config (Config): resolved configuration.
        resume (Path | None): a ``last`` checkpoint to continue from.
        run_dir (Path | None): folder of this run; a fresh one under ``checkpoint_dir`` by default.
        pseudo (LongTensor | None): invented items of each user, [users, M]; kept in the checkpoint.
        augmentation (dict | None): what is known about them, for the result.
        report (Callable | None): see ``PlanTrainer``.
        test (bool): False leaves the test part unread, as a search over settings must.

    Returns:
        RunResult: also written to ``result.json`` in the run's folder.

    Raises:
        UserError: if data, settings or checkpoint cannot be used.
        ConnectionError: if a tracked run cannot be opened.
        TrainingDiverged: if a loss becomes NaN or infinite.
        OutOfMemory: if memory runs out.
        Interrupted: after a signal; the state is saved.
        ProcessLost: if another process of a ``distributed.group`` ended.
    """
    tracking.check_libraries(config)
    check_tensorboard()
    start_logging(None, config["state"])
    with ExitStack() as lock:
        if resume:
            lock.enter_context(claimed(resume.parent))
        return _run(config, resume, run_dir, pseudo, augmentation, report, test, lock)


def _run(
    config: Config,
    resume: Path | None,
    run_dir: Path | None,
    pseudo: Tensor | None,
    augmentation: dict[str, Any] | None,
    report: Callable[[Progress], None] | None,
    test: bool,
    lock: ExitStack,
) -> RunResult:
    """See ``run``; ``lock`` takes that of a folder which is made once nothing can be refused."""
    stored: tuple[dict[str, Tensor], dict[str, Any]] = (
        load_run(resume, resumable=True) if resume else ({}, {})
    )
    if resume:
        check_same_settings(resume, stored[1], config)
    pseudo = stored[0].get(PSEUDO, pseudo)
    augmentation = augmentation or stored[1].get("augmentation", {})
    if config.name == AUGMENTED and pseudo is None:
        raise UserError(f"model={AUGMENTED} has stages before this one: call run_augmented(config)")
    dataset, train_data, valid_data, test_data, model = prepare(config, pseudo)
    if distributed.n_processes() > 1:
        _join_processes(config, dataset, (train_data, valid_data, test_data), model)
    if resume:
        check_same_data(resume, *stored, dataset)
    payload = _payload(config, dataset) | {"augmentation": augmentation}
    data = _histories(dataset) | ({} if pseudo is None else {"pseudo": pseudo.int()})
    # From here on nothing the user typed can be wrong.
    if resume:
        run_dir = resume.parent
    else:
        run_dir = Path(distributed.of_first(str(_made(config, run_dir))))
        lock.enter_context(claimed(run_dir))
    start_logging(run_dir, config["state"])
    logger.info(f"{config['dataset']}: {dataset.statistics}")
    logger.info(
        f"{config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config['device']}, run folder {run_dir}"
    )
    if not config.held_out:
        logger.info(
            f"trained on everything for epochs={config['epochs']}; nothing is validated or tested: "
            f"eval_args has split={config['eval_args']['split']}"
        )
    trainer = PlanTrainer(config, model, run_dir, payload, data, report)
    if resume:
        trainer.resume(resume)
        if trainer.progress.step > len(train_data):
            raise checkpoint.foreign(resume, f"its progress.step is {trainer.progress.step}")
        logger.info(f"resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}")
    with tracking.tracked(config, run_dir) as tracked:
        tracked.send(trainer.progress.log)
        with trainer.stoppable(), telling_memory(config, run_dir / LAST):
            progress = trainer.fit(train_data, valid_data, config["show_progress"], tracked.send)
            trainer.load_weights(run_dir / BEST)
            found = evaluate_splits(trainer, valid_data, test_data if test else None)
        result = _result(config, dataset, found, progress, run_dir, augmentation, test)
        if distributed.rank() > 0:
            return result
        if found.rankings:
            save_rankings(found.rankings, dataset, train_data._dataset, run_dir)
        text = json.dumps({**asdict(result), "log": progress.log}, indent=1)
        checkpoint.write_atomically(run_dir / RESULT, lambda name: Path(name).write_text(text))
        tracked.finish({name: getattr(result, name) for name in TRACKED})
    return result


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
    able = sorted(name for name, model in plugin_models().items() if _data_parallel(model))
    if config.name == AUGMENTED:
        raise UserError(
            f"model={AUGMENTED} is trained by one process. To train on its data with several, "
            "write them to a file with the command augment"
        )
    if not _data_parallel(config.model_class):
        raise UserError(
            f"model={config.name} is trained by one process: its loss on part of a batch is not a "
            f"part of its loss on the batch. Several processes train {', '.join(able)}"
        )
    if config["train_batch_size"] < n:
        raise UserError(
            f"train_batch_size={config['train_batch_size']} cannot be divided among {n} processes: "
            "each needs a row of every batch. Use fewer processes or a larger batch"
        )


def _data_parallel(model_class: Any) -> bool:
    return getattr(model_class, "data_parallel", False)


def _join_processes(
    config: Config, dataset: FlatDataset, loaders: tuple[Any, Any, Any], model: Any
) -> None:
    """See that all processes start from the same, and draw numbers of their own from here on.

    Raises:
        UserError: if they differ, or rows cannot be divided among them.
    """
    n, number = distributed.n_processes(), distributed.rank()
    check_processes(config, n)
    name = fingerprint(config, checkpoint.digest(_histories(dataset)))
    if distributed.largest(name != distributed.of_first(name)):
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
    distributed.take_from_first(model.state_dict().values())
    if number > 0:
        config["show_progress"] = False
        init_seed((config["seed"] + number) % 2**32, config["reproducibility"])


def run_once(
    config: Config,
    run_dir: Path,
    begin: Callable[..., RunResult] | None = None,
    report: Callable[[Progress], None] | None = None,
    test: bool = True,
) -> RunResult:
    """The run of this folder: its result where it is finished, continued where it is not.

    A run that was finished without its test is tested now, and not trained again.

    Args:
        config (Config): resolved configuration, always the same one for the same folder.
        run_dir (Path): see ``fingerprint`` for a name.
        begin (Callable | None): what starts it, called as ``run``, which it is by default.
        report (Callable | None): see ``PlanTrainer``.
        test (bool): whether the test part is read.

    Raises:
        UserError, TrainingDiverged, Interrupted: as ``run``.
    """
    with checkpoint.turn(run_dir):
        begin = begin or run
        last = run_dir / LAST if (run_dir / LAST).is_file() else None
        if (run_dir / RESULT).is_file():
            result = read_result(run_dir)
            if result.tested or not test:
                logger.info(f"finished before: {run_dir}")
                if test and config["save_rankings"] and not (run_dir / RANKS).is_file():
                    here = {k: config[k] for k in ("use_gpu", "show_progress", "save_rankings")}
                    evaluate(run_dir, here | {"data_path": config.plain()["values"]["data_path"]})
                return result
        elif last:
            begin = run
        return begin(config, resume=last, run_dir=run_dir, report=report, test=test)


def fingerprint(config: Config, data: str) -> str:
    """A short name of a run's result: of all settings that shape it, the data and the code.

    Args:
        config (Config): resolved configuration.
        data (str): checksum of the data.
    """
    plain = config.plain()
    values = {k: v for k, v in plain["values"].items() if k not in ELSEWHERE_KEYS}
    return short_key(plain | {"values": values, "data": data, "code": code()})


@cache
def code(package: Path = Path(__file__).parent) -> str:
    """Checksum of the package's definitions, but for those that only read results.

    In which file a definition stands does not count, nor do imports, docstrings, comments and
    formatting, so that stored results outlive a change of layout.

    Args:
        package (Path): folder of the source.
    """
    found: list[str] = []
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in READERS:
            found += filter(None, map(outline, ast.parse(path.read_text()).body))
    return hashlib.blake2b("\n".join(sorted(found)).encode(), digest_size=8).hexdigest()


def outline(part: Any) -> str:
    """A syntax tree as text, the same on every version of Python; empty for imports and docstrings.

    Args:
        part (Any): an ``ast`` node, a list of them, or the value of a field.
    """
    if isinstance(part, list):
        return f"[{','.join(filter(None, map(outline, part)))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    if text or isinstance(part, ast.Import | ast.ImportFrom):
        return ""
    fields = (f"{k}={outline(v)}" for k, v in ast.iter_fields(part) if v is not None and v != [])
    return f"{type(part).__name__}({','.join(fields)})"


def short_key(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for a set of JSON-ready values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def save_rankings(
    rows: Mapping[Any, Tensor], dataset: FlatDataset, train: FlatDataset, folder: Path
) -> None:
    """Write the test rankings, in the ids of the data set.

    ``ranks.csv`` has a line for each test row: ``user``, ``item`` (the target), ``length`` (items
    of the input), ``train_count`` (training interactions of the target), ``rank_kept`` and
    ``rank_removed`` (rank of the target, from 1, by protocol). ``lists.csv.gz`` has the items
    ranked first: ``user``, ``history`` (kept or removed), ``rank``, ``item``; a list has fewer than
    max(topk) items where fewer can be recommended.

    Args:
        rows (Mapping): ``Evaluation.rows``.
        dataset (FlatDataset): all interactions, for the ids.
        train (FlatDataset): the training part.
        folder (Path): of the run.
    """
    values = {name: tensor.numpy() for name, tensor in rows.items()}
    items = np.array(item_ids(dataset), dtype=object)
    user = np.array(user_ids(dataset), dtype=object)[values["user"]]
    rows_alone = not train.list_fields  # ready-made rows: their targets are all there is to count
    trained = train.inter_feat[train.iid_field] if rows_alone else train.training_items()[0]
    counts = torch.bincount(trained, minlength=dataset.item_num).numpy()
    ranks = {"user": user, "item": items[values["item"]], "length": values["length"]}
    ranks |= {"train_count": counts[values["item"]]}
    lists = []
    for protocol in (p for p in PROTOCOLS if ("rank", p) in rows):
        name, first = protocol.removeprefix("history "), values["list", protocol]
        ranks[f"rank_{name}"] = values["rank", protocol]
        n, k = first.shape
        columns = {"user": user.repeat(k), "history": name}
        columns |= {"rank": np.tile(np.arange(1, k + 1), n), "item": items[first.reshape(-1)]}
        lists.append(pd.DataFrame(columns)[first.reshape(-1) > 0])
    for name, table in ((RANKS, pd.DataFrame(ranks)), (LISTS, pd.concat(lists))):
        packed = "gzip" if name == LISTS else None
        write = partial(table.to_csv, index=False, compression=packed)
        checkpoint.write_atomically(folder / name, write)


def read_result(run_dir: Path) -> RunResult:
    """The result of a finished run.

    Raises:
        UserError: if there is none.
    """
    path = run_dir / RESULT
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the result of a finished run: {error}") from None
    known = {f.name for f in fields(RunResult)}
    # Where it is now, not where it was written.
    values = {k: v for k, v in values.items() if k in known} | {"run_dir": str(run_dir)}
    try:
        result = RunResult(**values)
    except TypeError as error:
        raise UserError(f"{path} is not the result of a finished run: {error}") from None
    modes = result.config["values"].get("eval_args", {}).get("mode", {})
    for split, results in (("valid", result.valid), ("test", result.test)):
        if KEPT in results:  # which earlier versions called drawn candidates, too
            setattr(result, split, _named(results, modes.get(split, "full")))
    return result


def prepare(config: Config, pseudo: Tensor | None = None) -> tuple[FlatDataset, Any, Any, Any, Any]:
    """Data set, training, validation and test loader, and the model on its device, all seeded.

    Args:
        config (Config): resolved configuration.
        pseudo (LongTensor | None): invented items of each user, [users, M].
    """
    init_seed(config["seed"], config["reproducibility"])
    pseudo = None if pseudo is None else pseudo.long()
    with config.naming_origins(), telling_memory(config):
        dataset = create_dataset(config)
        train_data, valid_data, test_data = create_loaders(config, dataset, pseudo)
        n_items = dataset.item_num - 1
        if max(config["topk"]) > n_items:
            raise UserError(f"topk={config['topk']} exceeds the {n_items} items there are")
        init_seed(config["seed"], config["reproducibility"])
        model = build_model(config, train_data._dataset).to(config["device"])
    return dataset, train_data, valid_data, test_data, model


class Found(NamedTuple):
    """Metrics of a trained model; see ``RunResult`` and ``Evaluation`` for the fields."""

    splits: dict[str, dict[str, Metrics]]
    by_length: dict[str, Metrics]
    sampling: dict[str, Any]
    rankings: dict[Any, Tensor]


def evaluate_splits(trainer: PlanTrainer, valid_data: Any, test_data: Any) -> Found:
    """Both splits under both protocols, and test by input length and over sampling seeds."""
    config, splits = trainer.config, {}
    by_length: dict[str, Metrics] = {}
    rankings: dict[Any, Tensor] = {}
    sampling: dict[str, Any] = {}
    show = config["show_progress"]
    if valid_data:
        splits["valid"] = trainer.evaluate_protocols(valid_data, PROTOCOLS, show)
    if test_data:
        splits["test"], by_length, rankings = trainer.evaluate_in_detail(
            test_data, config["length_groups"], show
        )
        draws = hasattr(trainer.model, "sampling_seed") and getattr(
            trainer.model, "sample_noise", True
        )
        if draws and config["sampling_seeds"] > 1:
            sampling = _over_sampling_seeds(trainer, test_data, splits["test"][KEPT])
    return Found(splits, by_length, sampling, rankings)


def _over_sampling_seeds(trainer: PlanTrainer, test_data: Any, first: Metrics) -> dict[str, Any]:
    """Mean and standard deviation of the test metrics over the model's sampling seeds."""
    model, config = trainer.model, trainer.config
    own, found = model.sampling_seed, [first]
    for offset in range(1, config["sampling_seeds"]):
        model.sampling_seed = own + offset
        found.append(trainer.evaluate_protocols(test_data, (KEPT,), config["show_progress"])[KEPT])
    model.sampling_seed = own
    spread = {
        name: {
            "mean": statistics.mean(values[name] for values in found),
            "std": statistics.stdev(values[name] for values in found),
        }
        for name in first
    }
    return {"seeds": [own + offset for offset in range(len(found))], **spread}


class Restored(NamedTuple):
    """A trained model with its data.

    Attributes:
        path (Path): the checkpoint.
        config (Config): its configuration.
        dataset (FlatDataset): all interactions.
        loaders (tuple): of training, validation and test.
        model (SequentialRecommender): with the weights of the checkpoint, on its device.
        content (dict): JSON content of the checkpoint.
    """

    path: Path
    config: Config
    dataset: FlatDataset
    loaders: tuple[Any, Any, Any]
    model: Any
    content: dict[str, Any]


def restore(
    place: str | Path, overrides: Mapping[str, Any] | None = None, origin: str = OVERRIDES
) -> Restored:
    """A checkpoint's model with the data it was trained on.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        overrides (Mapping | None): of ``EVALUATION_KEYS``.
        origin (str): what they are called in messages.

    Raises:
        UserError: if checkpoint or data cannot be used, or they do not belong together.
    """
    path = checkpoint.find(place, BEST)
    tensors, content = load_run(path)
    model_class = stored_config(content, {}, ()).model_class
    allowed = (*EVALUATION_KEYS, *getattr(model_class, "evaluation_keys", ()))
    config = stored_config(content, overrides or {}, allowed, origin)
    start_logging(None, config["state"])
    dataset, *loaders, model = prepare(config, tensors.get(PSEUDO))
    logger.info(f"{config['dataset']}: {dataset.statistics}")
    check_same_data(path, tensors, content, dataset)
    load_model_state(model, checkpoint.split(tensors, "model"), path)
    return Restored(path, config, dataset, tuple(loaders), model, content)


def evaluate(
    place: str | Path,
    overrides: Mapping[str, Any] | None = None,
    test: bool = True,
    origin: str = OVERRIDES,
) -> RunResult:
    """Evaluate a checkpoint on the validation and test parts of its data set.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        overrides (Mapping | None): of ``EVALUATION_KEYS``.
        test (bool): whether the test part is read.
        origin (str): what the overrides are called in messages.

    Returns:
        RunResult: the run's folder is left as it is, unless ``save_rankings`` asks for rankings.

    Raises:
        UserError: if checkpoint or data cannot be used, or they do not belong together.
    """
    check_tensorboard()
    path, config, dataset, (train_data, valid_data, test_data), model, content = restore(
        place, overrides, origin
    )
    if not config.held_out:
        raise UserError(
            f"{path} was trained on everything, so there is nothing to evaluate on: eval_args has "
            f"split={config['eval_args']['split']}. The command recommend uses it"
        )
    trainer = PlanTrainer(config, model, path.parent)
    trainer.eval_collector.data_collect(train_data)
    with telling_memory(config, path):
        found = evaluate_splits(trainer, valid_data, test_data if test else None)
    if found.rankings:
        save_rankings(found.rankings, dataset, train_data._dataset, path.parent)
    progress = Progress(**content["progress"])
    augmentation = content.get("augmentation", {})
    return _result(config, dataset, found, progress, path.parent, augmentation, test)


def _result(
    config: Config,
    dataset: FlatDataset,
    found: Found,
    progress: Progress,
    run_dir: Path,
    augmentation: dict[str, Any],
    tested: bool,
) -> RunResult:
    modes = config["eval_args"]["mode"]
    return RunResult(
        valid=_named(found.splits.get("valid", {}), modes["valid"]),
        test=_named(found.splits.get("test", {}), modes["test"]),
        best_epoch=progress.best_epoch,
        epochs=len(progress.log),
        seconds=progress.seconds,
        peak_memory_mb=peak_memory_mb(),
        statistics=asdict(dataset.statistics),
        config=config.plain(),
        versions=versions(),
        run_dir=str(run_dir),
        tested=tested,
        by_length=found.by_length,
        sampling=found.sampling,
        augmentation=augmentation,
        processes=distributed.n_processes(),
        peak_gpu_memory_mb=torch.cuda.max_memory_allocated() / 2**20,
    )


def _named(results: Mapping[str, Metrics], mode: str) -> dict[str, Metrics]:
    return {protocol_name(name, mode): metrics for name, metrics in results.items()}


def stored_config(
    content: Mapping[str, Any],
    overrides: Mapping[str, Any],
    allowed: Sequence[str],
    origin: str = OVERRIDES,
) -> Config:
    """The configuration a checkpoint was made with, with a few values replaced.

    Args:
        content (Mapping): JSON content of the checkpoint.
        overrides (Mapping): values to replace.
        allowed (Sequence): keys that may be replaced.
        origin (str): what the values to replace are called in messages.

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
    origins = dict.fromkeys(values, CHECKPOINT) | dict.fromkeys(overrides, origin)
    return Config(stored["model"], stored["dataset"], overrides=values, origin=origins)


def resumed_config(resume: Path, overrides: Mapping[str, Any], origin: str = OVERRIDES) -> Config:
    """The configuration to continue a run with.

    Its tracked run is continued where there is one. Nobody else's checkpoint opens one.

    Args:
        resume (Path): a ``last`` checkpoint.
        overrides (Mapping): of ``RESUMABLE_KEYS``.
        origin (str): what messages call the place of the overrides.

    Raises:
        UserError: if the checkpoint cannot be used, or a key may not be given.
    """
    content = load_run(resume, resumable=True)[1]
    values = content["config"]["values"]
    for key in ("log_wandb", "log_mlflow"):
        if values.get(key) and not (resume.parent / tracking.IDENTITY).is_file():
            values[key] = False
            if key not in overrides:
                logger.warning(
                    f"{resume} says {key}=True, but no tracked run began in this folder; give "
                    f"--{key}=true to begin one"
                )
    return stored_config(content, overrides, RESUMABLE_KEYS, origin)


def check_same_settings(path: Path, content: Mapping[str, Any], config: Config) -> None:
    """Refuse to continue with the default of a setting that the checkpoint lacks.

    Raises:
        UserError: naming the setting.
    """
    lacking = config.plain()["values"].keys() - content["config"]["values"].keys()
    if lacking:
        raise checkpoint.foreign(path, f"it lacks config.values.{min(lacking)}")


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
    same = same and content.get("ready_rows") == _ready_rows(dataset)
    if not same or any(not torch.equal(v, stored[k]) for k, v in _histories(dataset).items()):
        counts = type(dataset.statistics)(**content["statistics"])
        raise UserError(
            f"the data set {dataset.dataset_name!r} at {dataset.dataset_path} is not the one "
            f"{path} was trained on: it has {dataset.statistics}, the checkpoint "
            f"{counts}; or its events come in another order"
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
        "ready_rows": _ready_rows(dataset),
    }


def _ready_rows(dataset: FlatDataset) -> str | None:
    """Checksum of the rows of ``benchmark_filename``, which are no whole histories."""
    if dataset.list_fields:
        return None
    rows, sizes = dataset.inter_feat.interaction, torch.tensor(dataset.file_size_list)
    history = dataset.iid_field + dataset.config["LIST_SUFFIX"]
    longest = int(rows[dataset.item_list_length_field].max())
    return checkpoint.digest(rows | {"sizes": sizes, history: rows[history][:, :longest]})


def _histories(dataset: FlatDataset) -> dict[str, Tensor]:
    """All interactions of each user in order, so that a checkpoint alone can recommend to them."""
    if not dataset.list_fields:
        return {}
    counts = torch.bincount(dataset.flat[dataset.uid_field], minlength=dataset.user_num)
    ends = counts.cumsum(0)
    return {"history_items": dataset.flat[dataset.iid_field].int(), "history_ends": ends}


def _made(config: Config, run_dir: Path | None) -> Path:
    """The folder of a run, made: the one given, or a fresh one under ``checkpoint_dir``."""
    while distributed.rank() == 0:
        name = f"{config.name}-{config['dataset']}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = run_dir or Path(config["checkpoint_dir"]) / f"{name}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True, exist_ok=run_dir is not None)
        except FileExistsError as error:
            if run_dir or not folder.is_dir():
                raise _unwritable(folder, error) from error
        except OSError as error:
            raise _unwritable(folder, error) from error
        else:
            return folder
    return Path()


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Within the block no other process trains in the folder; what killed ones left is swept.

    Raises:
        UserError: if another process does, or the folder cannot be written.
    """
    with ExitStack() as lock:
        taken = False
        try:
            if distributed.rank() == 0:  # the log is there in any case
                lock.enter_context(checkpoint.locked(_log(run_dir), wait=False))
                checkpoint.sweep(run_dir)
        except BlockingIOError:
            taken = True
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        if distributed.largest(taken):
            raise UserError(f"another process trains in {run_dir}; wait for it, or stop it")
        yield


def _log(run_dir: Path) -> Path:
    """The log of a run, by whatever path its folder is called."""
    return run_dir / f"{run_dir.resolve().name}.log"


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"the run folder {run_dir} cannot be written ({error.strerror}); checkpoint_dir says where "
        "runs go"
    )


class _LogFile(logging.FileHandler):
    """What a full disk does not take is lost; that checkpoints cannot be written is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """No traceback."""


def start_logging(run_dir: Path | None, level: str = "INFO") -> None:
    """Log to the terminal and, with a run folder, to ``<run>.log`` in it; process 0 alone does."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if run_dir is not None:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(_log(run_dir)))
        except OSError as error:
            raise _unwritable(run_dir, error) from error
    level = level.upper() if distributed.rank() == 0 else "CRITICAL"
    logging.basicConfig(level=level, format="%(message)s", handlers=handlers, force=True)


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions that shape the numbers."""
    libraries = {name: version(name) for name in ("recbole", "torch", "numpy", "pandas")}
    return {"recbole_simdiff": __version__, "python": platform.python_version(), **libraries}
