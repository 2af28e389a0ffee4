"""A run put together again from its checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, load_model_state
from recbole_simdiff.config.config import CHECKPOINT, OVERRIDES, Config
from recbole_simdiff.config.keys import EVALUATION_KEYS, NOT_IN_RESULT, RESUMABLE_KEYS, START_KEYS
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError, explained_out_of_memory
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.rankings import save_rankings
from recbole_simdiff.log import logger
from recbole_simdiff.models.own import is_file
from recbole_simdiff.models.own import known as known_model
from recbole_simdiff.models.registry import WRAPPERS, accept
from recbole_simdiff.runs.build import PSEUDO, build_run, evaluate_splits
from recbole_simdiff.runs.folder import logged
from recbole_simdiff.runs.result import RunResult, build_result
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.training import tracking
from recbole_simdiff.training.progress import Progress

# What the code did before a setting was there, where that is not the setting's default.
FORMER = {"SimDiffRec": {"rounding": "tied", "reverse_clamp": "none"}}


class RestoredRun(NamedTuple):
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
) -> RestoredRun:
    """A checkpoint's model with the data it was trained on.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        overrides (Mapping | None): of ``EVALUATION_KEYS``.
        origin (str): what they are called in messages.

    Raises:
        UserError: if checkpoint or data cannot be used, or they do not belong together.
    """
    path = checkpoint.resolve(place, BEST)
    tensors, content = load_run(path)
    check_own_model(content)
    model_class = stored_config(content, {}, ()).model_class
    allowed = (*EVALUATION_KEYS, *model_class.evaluation_keys)
    config = stored_config(content, overrides or {}, allowed, origin)
    with logged(config):
        dataset, *loaders, model = build_run(config, tensors.get(PSEUDO))
        logger.info(f"{config['dataset']}: {dataset.statistics}")
    check_same_data(path, tensors, content, dataset)
    load_model_state(model, checkpoint.subset(tensors, "model"), path)
    return RestoredRun(path, config, dataset, tuple(loaders), model, content)


def evaluate(
    place: str | Path,
    overrides: Mapping[str, Any] | None = None,
    test: bool = True,
    origin: str = OVERRIDES,
    model: str | Path | type | None = None,
) -> RunResult:
    """Evaluate a checkpoint on the validation and test parts of its data set.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        overrides (Mapping | None): of ``EVALUATION_KEYS``.
        test (bool): whether the test part is read.
        origin (str): what the overrides are called in messages.
        model (str | Path | type | None): of a checkpoint of your own model, its class or its
            ``FILE.py``.

    Returns:
        RunResult: the run's folder is left as it is, unless ``save_rankings`` asks for rankings.

    Raises:
        UserError: if checkpoint or data cannot be used, or they do not belong together.
    """
    accept(model)
    path, config, dataset, (train_data, valid_data, test_data), trained, content = restore(
        place, overrides, origin
    )
    if not config.held_out:
        raise UserError(
            f"{path} was trained on everything, so there is nothing to evaluate on: eval_args has "
            f"split={config['eval_args']['split']}. The command recommend uses it"
        )
    evaluator = Evaluator(config, trained, config["device"])
    evaluator.data_collect(train_data)
    with logged(config), explained_out_of_memory(config, path):
        metrics = evaluate_splits(evaluator, valid_data, test_data if test else None)
    if metrics.rankings:
        save_rankings(metrics.rankings, dataset, train_data._dataset, path.parent)
    progress = Progress(**content["progress"])
    augmentation = content.get("augmentation", {})
    return build_result(config, dataset, metrics, progress, path.parent, augmentation, test)


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
                f"{key} cannot be changed here: the checkpoint fixes it. Allowed: "
                f"{', '.join(allowed)}"
            )
    stored = content["config"]
    alone = stored["model"] not in WRAPPERS
    trained = stored["model"] if alone else str(stored["values"].get("backbone"))
    values = {**FORMER.get(trained, {}), **stored["values"], **overrides}
    origins = dict.fromkeys(values, CHECKPOINT) | dict.fromkeys(overrides, origin)
    return Config(stored["model"], stored["dataset"], overrides=values, origin=origins)


def resumed_config(
    resume: Path,
    overrides: Mapping[str, Any],
    origin: str = OVERRIDES,
    processes: int = 1,
    any_number: bool = False,
) -> Config:
    """The configuration to continue a run with.

    Its tracked run is continued where there is one. Nobody else's checkpoint opens one.

    Args:
        resume (Path): a ``last`` checkpoint.
        overrides (Mapping): of ``RESUMABLE_KEYS``.
        origin (str): what messages call the place of the overrides.
        processes (int): how many are to continue it.
        any_number (bool): whether it may be another number than before.

    Raises:
        UserError: if the checkpoint cannot be used, or a key may not be given.
    """
    content = load_run(resume, resumable=True)[1]
    if not any_number:
        check_same_processes(resume, content, processes)
    check_own_model(content, same=True)
    values = content["config"]["values"]
    if "epochs" in overrides and content.get("phase_epochs"):
        raise UserError(
            f"epochs={overrides['epochs']} has no effect here: epochs_from="
            f"{values.get('epochs_from')} decided for how long the run is trained; leave epochs out"
        )
    for key in ("log_wandb", "log_mlflow"):
        if values.get(key) and not (resume.parent / tracking.IDENTITY).is_file():
            values[key] = False
            if key not in overrides:
                logger.warning(
                    f"{resume} says {key}=True, but no tracked run began in this folder; give "
                    f"--{key}=true to begin one"
                )
    return stored_config(content, overrides, RESUMABLE_KEYS, origin)


def check_own_model(content: Mapping[str, Any], same: bool = False) -> None:
    """See that the user has named the own model of a checkpoint, and whether its code is the same.

    Args:
        content (Mapping): JSON content of the checkpoint.
        same (bool): whether other code is refused; else it is warned of.

    Raises:
        UserError: asking for the class, or saying that its code is another.
    """
    if "own_model" not in content:
        return
    name, file, checksum = (content["own_model"][key] for key in ("name", "file", "checksum"))
    own_model = known_model(name)
    if own_model is None:
        way = f"--model_file={file}, or " if is_file(file) else ""
        raise UserError(
            f"the checkpoint was trained with model={name} of {file}, a model of your own, and "
            f"opening a checkpoint runs no code. Name it: {way}model={name} (the class) in Python"
        )
    if checksum == own_model.checksum or not (checksum and own_model.checksum):
        return
    message = (
        f"model={name}: its code in {own_model.place} (checksum {own_model.checksum}) is not the "
        f"code that the checkpoint was trained with ({file}, checksum {checksum})"
    )
    if same:
        raise UserError(
            f"{message}; a run goes on with the code it began with. Put that back, or begin a new "
            "run"
        )
    logger.warning(f"{message}; its weights are used as they are")


def check_same_processes(path: Path, content: Mapping[str, Any], n: int) -> None:
    """Refuse to continue a run by another number of processes than before.

    Args:
        path (Path): the checkpoint, for the message.
        content (Mapping): its JSON content.
        n (int): number of processes.

    Raises:
        UserError: saying how to choose it.
    """
    before = content.get("processes", 1)
    if before != n:
        raise UserError(
            f"{path} holds the random states of {before} processes and cannot be resumed by {n}; "
            f"give --nproc={before}. Another number is taken if it is given, such as --nproc={n}; "
            "the random states are then drawn anew"
        )


def check_same_settings(path: Path, content: Mapping[str, Any], config: Config) -> None:
    """Refuse to continue with the default of a setting that the checkpoint lacks.

    Raises:
        UserError: naming the setting.
    """
    lacking = config.plain()["values"].keys() - content["config"]["values"].keys()
    if lacking := lacking - START_KEYS - NOT_IN_RESULT:
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
    if "n_users" in content:
        raise UserError(
            f"{path} holds no users and histories: it recommends, exports and serves, and cannot "
            "be evaluated or resumed"
        )
    stored = checkpoint.subset(tensors, "data")
    same = content["items"] == dataset.item_ids and content["users"] == dataset.user_ids
    same = same and content.get("ready_rows") == dataset.ready_rows()
    if not same or any(not torch.equal(v, stored[k]) for k, v in dataset.histories().items()):
        counts = type(dataset.statistics)(**content["statistics"])
        raise UserError(
            f"the data set {dataset.dataset_name!r} at {dataset.dataset_path} is not the one "
            f"{path} was trained on: it has {dataset.statistics}, the checkpoint "
            f"{counts}; or its events come in another order"
        )
