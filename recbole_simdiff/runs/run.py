"""One training and its test: the only road every command takes."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_simdiff import checkpoint, distributed, files
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError, explained_out_of_memory
from recbole_simdiff.evaluation.rankings import RANKS, save_rankings
from recbole_simdiff.log import logger
from recbole_simdiff.modules.plan import with_epochs
from recbole_simdiff.runs.best_epochs import best_epochs, check_validated
from recbole_simdiff.runs.build import PSEUDO, build_run, evaluate_splits
from recbole_simdiff.runs.estimate import FirstEstimate, batch_sizes
from recbole_simdiff.runs.folder import claimed, logged, new_folder
from recbole_simdiff.runs.item_table import install_item_table
from recbole_simdiff.runs.processes import explained_loss, join_processes
from recbole_simdiff.runs.record import describe_run
from recbole_simdiff.runs.restore import check_same_data, check_same_settings, evaluate
from recbole_simdiff.runs.result import (
    RESULT,
    TRACKED,
    RunResult,
    build_result,
    read_result,
    versions,
)
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.runs.warm_start import warm_start
from recbole_simdiff.runs.without_users import check_history_only, leave_out_users
from recbole_simdiff.training import tracking
from recbole_simdiff.training.progress import Listener, check_tensorboard
from recbole_simdiff.training.trainer import PlanTrainer

# Said once a run: models can learn from what happened after a test item.
LEAK = (
    "leave-one-out tests each user's newest item, so training has interactions of other users that "
    "are newer than a test item. For a split by time, without this leak: "
    "--eval_args='{split: {RS: [0.8, 0.1, 0.1]}, group_by: none}'"
)


def run_one(
    config: Config,
    resume: Path | None = None,
    run_dir: Path | None = None,
    pseudo: Tensor | None = None,
    augmentation: dict[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
    test: bool = True,
) -> RunResult:
    """Train, select on validation, test once, save.

    Args:
        config (Config): resolved configuration.
        resume (Path | None): a ``last`` checkpoint to continue from.
        run_dir (Path | None): folder of this run; a fresh one under ``checkpoint_dir`` by default.
        pseudo (LongTensor | None): pseudo-items of each user, [users, M]; kept in the checkpoint.
        augmentation (dict | None): what is known about them, for the result.
        listeners (Sequence): are called after every epoch and of the result.
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
    with logged(config), ExitStack() as held:
        if resume:
            held.enter_context(claimed(resume.parent))
        return _run_one(config, resume, run_dir, pseudo, augmentation, listeners, test, held)


def _run_one(
    config: Config,
    resume: Path | None,
    run_dir: Path | None,
    pseudo: Tensor | None,
    augmentation: dict[str, Any] | None,
    listeners: Sequence[Listener],
    test: bool,
    held: ExitStack,
) -> RunResult:
    """See ``run_one``; ``held`` takes lock and log of the folder, made when nothing is refused."""
    stored: tuple[dict[str, Tensor], dict[str, Any]] = (
        load_run(resume, resumable=True) if resume else ({}, {})
    )
    if resume:
        check_same_settings(resume, stored[1], config)
    pseudo = stored[0].get(PSEUDO, pseudo)
    augmentation = augmentation or stored[1].get("augmentation", {})
    if config.wraps and pseudo is None:
        raise UserError(
            f"model={config.name} has runs before this one, which pipelines.start makes"
        )
    dataset, train_data, valid_data, test_data, model = build_run(config, pseudo)
    if distributed.world_size() > 1:
        join_processes(config, dataset, (train_data, valid_data, test_data), model)
    if resume:
        check_same_data(resume, *stored, dataset)
    if valid_data:
        check_validated(config, model.training_plan())
    taken, phase_epochs = [], stored[1].get("phase_epochs", {})
    if not resume:
        taken = _begun_from(config, dataset, train_data._dataset, model)
        phase_epochs = best_epochs(config, model.training_plan())
    payload = _payload(config, dataset) | {"augmentation": augmentation}
    payload |= {"phase_epochs": phase_epochs} if phase_epochs else {}
    data = dataset.histories() | ({} if pseudo is None else {"pseudo": pseudo.int()})
    # From here on nothing the user typed can be wrong.
    if resume:
        run_dir = resume.parent
    else:
        run_dir = Path(distributed.broadcast_text(str(new_folder(config, run_dir))))
        held.enter_context(claimed(run_dir))
    held.enter_context(logged(config, run_dir))
    _log_start(config, dataset, model, run_dir, taken, phase_epochs)
    if not resume and config["benchmark_filename"] is None and "LS" in config["eval_args"]["split"]:
        logger.info(LEAK)
    trainer = PlanTrainer(config, model, run_dir, payload, data, phase_epochs=phase_epochs)
    if resume:
        trainer.resume(resume)
        if trainer.progress.step > len(train_data):
            raise checkpoint.foreign(resume, f"its progress.step is {trainer.progress.step}")
        logger.info(f"resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}")
    elif FirstEstimate.is_due(config, run_dir):
        phases = with_epochs(model.training_plan(), phase_epochs)
        listeners = (*listeners, FirstEstimate(phases, batch_sizes(train_data)))
    loaders = (train_data, valid_data, test_data if test else None)
    return _train_and_test(trainer, dataset, loaders, augmentation, listeners, test)


def _log_start(
    config: Config,
    dataset: FlatDataset,
    model: Any,
    run_dir: Path,
    taken: Sequence[str],
    phase_epochs: Mapping[str, int],
) -> None:
    """Log data, model and folder of a run, and what is unusual about it."""
    logger.info(f"{config['dataset']}: {dataset.statistics}")
    logger.info(
        f"{config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{config['device']}, run folder {run_dir}"
    )
    for line in taken:
        logger.info(line)
    _say_epochs(config, phase_epochs)


def _begun_from(config: Config, dataset: FlatDataset, train: FlatDataset, model: Any) -> list[str]:
    """Check a new model, and put into it what other runs give; lines for the log."""
    check_history_only(config, model)
    lines = [install_item_table(config, dataset, model)]
    return [*filter(None, lines), *warm_start(config, dataset, train, model)]


def _say_epochs(config: Config, phase_epochs: Mapping[str, int]) -> None:
    """Log for how long a run without validation is trained."""
    listed = ", ".join(f"{name} {epochs}" for name, epochs in phase_epochs.items())
    if listed:
        logger.info(f"epochs that {config['epochs_from']} found best: {listed}")
    if not config.held_out:
        logger.info(
            f"trained on everything for epochs={listed or config['epochs']}; nothing is validated "
            f"or tested: eval_args has split={config['eval_args']['split']}"
        )


def _train_and_test(
    trainer: PlanTrainer,
    dataset: FlatDataset,
    loaders: tuple[Any, Any, Any],
    augmentation: dict[str, Any],
    listeners: Sequence[Listener],
    test: bool,
) -> RunResult:
    """The training, the evaluation of its best epoch, and what is written of both."""
    config, run_dir, (train_data, valid_data, test_data) = trainer.config, trainer.run_dir, loaders
    record = describe_run(config, distributed.world_size()) if distributed.rank() == 0 else {}
    with tracking.tracked(config, run_dir) as tracked:
        all_listeners = (tracked, *listeners)
        tracked.send(trainer.progress.log)
        explained = explained_out_of_memory(config, run_dir / LAST)
        with trainer.stop.listen(), explained, explained_loss(run_dir):
            progress = trainer.fit(train_data, valid_data, config["show_progress"], all_listeners)
            trainer.load_weights(run_dir / BEST)
            metrics = evaluate_splits(trainer.evaluator, valid_data, test_data)
        result = build_result(config, dataset, metrics, progress, run_dir, augmentation, test)
        result.record = record
        if distributed.rank() > 0:
            return result
        if metrics.rankings:
            save_rankings(metrics.rankings, dataset, train_data._dataset, run_dir)
        content = {**asdict(result), "log": progress.log}
        files.write_text(run_dir / RESULT, json.dumps(content, indent=1))
        if test and config["without_users"]:
            leave_out_users(run_dir)
        for listener in all_listeners:
            listener.on_end({name: getattr(result, name) for name in TRACKED})
    return result


def run_once(
    config: Config,
    run_dir: Path,
    begin: Callable[..., RunResult] | None = None,
    listeners: Sequence[Listener] = (),
    test: bool = True,
) -> RunResult:
    """The run of this folder: its result where it is finished, continued where it is not.

    A run that was finished without its test is tested now, and not trained again.

    Args:
        config (Config): resolved configuration, always the same one for the same folder.
        run_dir (Path): see ``fingerprint`` for a name.
        begin (Callable | None): what starts it, called as ``run_one``, which it is by default.
        listeners (Sequence): see ``run_one``.
        test (bool): whether the test part is read.

    Raises:
        UserError, TrainingDiverged, Interrupted: as ``run_one``.
    """
    with files.exclusive(run_dir):
        begin = begin or run_one
        last = run_dir / LAST if (run_dir / LAST).is_file() else None
        if (run_dir / RESULT).is_file():
            result = read_result(run_dir)
            if result.tested or not test:
                logger.info(f"finished before: {run_dir}")
                if result.tested and last and config["without_users"]:
                    leave_out_users(run_dir)  # it was stopped before it had done so
                if test and config["save_rankings"] and not (run_dir / RANKS).is_file():
                    here = {k: config[k] for k in ("use_gpu", "show_progress", "save_rankings")}
                    evaluate(run_dir, here | {"data_path": config.data_root})
                return result
        return begin(config, resume=last, run_dir=run_dir, listeners=listeners, test=test)


def _payload(config: Config, dataset: FlatDataset) -> dict[str, Any]:
    return {
        "config": config.plain(),
        "versions": versions(),
        "statistics": asdict(dataset.statistics),
        "items": dataset.item_ids,
        "users": dataset.user_ids,
        "titles": dataset.item_titles(),
        "ready_rows": dataset.ready_rows(),
        **({"own_model": config.own.note()} if config.own else {}),
    }
