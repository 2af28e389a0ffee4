"""Training on augmented data: the stages of DiffuASR (arXiv 2309.12858), cached one by one.

    baseline    the backbone alone, an ordinary run on the raw data: what a gain is measured
                against, and the recommender whose item table and judgement guide the generator
    diffuser    the generator, trained on the training interactions
    pseudo      pseudo-items of each user, put in front of the training history
    final       the backbone again, on the augmented data

A stage is looked up in ``augmentation_cache`` under a key of everything that shaped it, so an
interrupted or changed command repeats only what it must. The generator sees training interactions
only: they are handed over as flat arrays that hold nothing else. The baseline's best epoch is
chosen on validation, as in any run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import (
    BEST,
    load_model_state,
)
from recbole_simdiff.config.config import CHECKPOINT, Config
from recbole_simdiff.data.dataset import FlatDataset, create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import Interrupted, UserError, explained_out_of_memory
from recbole_simdiff.log import logger
from recbole_simdiff.models.diffuasr.generator import (
    GENERATION_KEYS,
    SAMPLING_KEYS,
    check_width,
)
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.random_items import random_from_history, random_items
from recbole_simdiff.models.registry import WRAPPERS, build_model
from recbole_simdiff.pipelines.generation import generate
from recbole_simdiff.pipelines.pairs import users_to_learn_from
from recbole_simdiff.pipelines.report import compared_quality, format_quality
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.folder import logged
from recbole_simdiff.runs.identity import digest_of, fingerprint, source_checksum
from recbole_simdiff.runs.restore import check_same_data, evaluate
from recbole_simdiff.runs.result import RESULT, RunResult, read_result
from recbole_simdiff.runs.run import run_once, run_one
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.training.progress import Listener


class Augmented(NamedTuple):
    """Result of the stages before the last.

    Attributes:
        dataset (FlatDataset): all interactions.
        pseudo (LongTensor): pseudo-items of each user, oldest first, 0 for none, [users, M].
        notes (dict): what the final result says about them.
    """

    dataset: FlatDataset
    pseudo: Tensor
    notes: dict[str, Any]


def run_stages(
    config: Config,
    resume: Path | None = None,
    run_dir: Path | None = None,
    listeners: Sequence[Listener] = (),
    test: bool = True,
) -> RunResult:
    """All stages.

    Args:
        config (Config): of ``--model=DiffuASR``.
        resume (Path | None): a ``last`` checkpoint of the final stage to continue from. It holds
            the pseudo-items, so the stages before are passed over, unless the run was finished
            without a test and is to be tested now, as then its baseline is.
        run_dir (Path | None): folder of the final stage; a fresh one under ``checkpoint_dir`` by
            default.
        listeners (Sequence): of the final stage, see ``run_one``.
        test (bool): whether the test part is read, by any stage.

    Returns:
        RunResult: of the final stage; ``augmentation`` holds the rest.

    Raises:
        UserError: if data or settings cannot be used.
        Interrupted: after a signal; finished stages and the state of this one are kept.
    """
    if resume:
        finished = (resume.parent / RESULT).is_file()
        if not (test and finished and not read_result(resume.parent).tested):
            return run_one(config, resume, run_dir, listeners=listeners, test=test)
    with logged(config):
        _, pseudo, notes = augment(config, test)
        logger.info(f"final: {config.model} on augmented data")
        return run_one(config, resume, run_dir, pseudo, notes, listeners, test)


def augment(config: Config, test: bool = True) -> Augmented:
    """The stages before the last, each from the cache where it is there.

    Args:
        config (Config): of ``--model=DiffuASR``.
        test (bool): whether the test part is read, by the baseline.

    Raises:
        UserError: if data or settings cannot be used.
        Interrupted: after a signal; the same command continues.
    """
    try:
        with logged(config), explained_out_of_memory(config):
            return _augment(config, test)
    except Interrupted as stop:
        stop.same_command = True
        raise


def _augment(config: Config, test: bool) -> Augmented:
    dataset = create_dataset(config)
    train = create_loaders(config, dataset)[0]._dataset
    if not dataset.list_fields:
        raise UserError(
            "DiffuASR needs one interaction a line; benchmark_filename gives ready-made prefixes"
        )
    items, ends = train.training_items()
    width = _check_backbone(config, train, ends)
    baseline = train_baseline(config, Path(config["augmentation_cache"]), dataset, test)
    weights = checkpoint.load(checkpoint.resolve(baseline.run_dir, BEST))[0]
    model = _recommender(config.backbone(), weights, baseline)
    by_model = config["augmenter"] == "diffuasr"
    shaped_by = {
        "code": source_checksum(),
        "augmenter": config["augmenter"],
        "settings": {key: config[key] for key in (GENERATION_KEYS if by_model else ("n_pseudo",))},
        "seed": config["seed"],
        "data": files.digest({"items": items, "ends": ends}),
        "items": dataset.item_num,
        "width": width,
        "guide": files.digest(checkpoint.subset(weights, "model")) if by_model else "",
    }
    path, pseudo, log = _cached_pseudo_items(config, items, ends, model, shaped_by)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    pseudo = pseudo.masked_fill((lengths == 0).unsqueeze(1), 0)
    notes = {
        "augmenter": config["augmenter"],
        "backbone": config.model,
        "baseline": {
            "run_dir": baseline.run_dir,
            "model": baseline.config["model"],
            "valid": baseline.valid,
            "test": baseline.test,
            "by_length": baseline.by_length,
        },
        "quality": compared_quality(pseudo, items, ends, model, config["seed"]),
        "pseudo": str(path),
        "log": log,
        "seconds": baseline.seconds + sum(v for k, v in log.items() if k.endswith("_seconds")),
    }
    logger.info(format_quality(notes["quality"]))
    return Augmented(dataset, pseudo, notes)


def _cached_pseudo_items(
    config: Config, items: Tensor, ends: Tensor, model: Any, shaped_by: Mapping[str, Any]
) -> tuple[Path, Tensor, dict[str, Any]]:
    """The cache's file of pseudo-items, written where it is not there; what it holds, and a log."""
    name = f"{config['augmenter']}-{config['dataset']}-{digest_of(shaped_by)}.safetensors"
    path = Path(config["augmentation_cache"]) / name
    with files.exclusive(path):
        if path.is_file():
            logger.info(f"pseudo: {path}")
        else:
            pseudo, log = _pseudo_items(config, items, ends, model, shaped_by)
            checkpoint.save(path, {"pseudo": pseudo.int()}, {"shaped_by": shaped_by, "log": log})
            logger.info(f"pseudo: {path} written")
    tensors, content = checkpoint.load(path)
    if "pseudo" not in tensors or "log" not in content:
        raise checkpoint.foreign(path, "it lacks the pseudo-items or their log")
    return path, tensors["pseudo"].long(), content["log"]


def _check_backbone(config: Config, train: FlatDataset, ends: Tensor) -> int:
    """Width of the backbone's item table; refuse, before anything is trained, what cannot work."""
    alone = config.backbone()
    guide = Guide(build_model(alone, train), "cpu")
    width = guide.table().shape[1]
    if config["augmenter"] == "diffuasr":
        users_to_learn_from(config, ends)
        check_width(width, len(config["sunet_channel_mult"]))
        if config["diffuasr_guidance"] == "classifier":
            guide.check(config["n_pseudo"])
    return width


def _pseudo_items(
    config: Config, items: Tensor, ends: Tensor, model: Any, shaped_by: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Pseudo-items of each user, [users, M], and a log of how they were made."""
    if config["augmenter"] == "random":
        return random_items(items, ends, config["n_pseudo"], config["seed"]), {}
    if config["augmenter"] == "random_seq":
        return random_from_history(items, ends, config["n_pseudo"], config["seed"]), {}
    # What only sampling reads does not change the generator, unless it is trained with guidance.
    guided = config["diffuasr_guide_in_training"] or config["diffuasr_cf_training"] == "combined"
    settings = {k: config[k] for k in GENERATION_KEYS if guided or k not in SAMPLING_KEYS}
    key = digest_of({**shaped_by, "settings": settings})
    place = Path(config["augmentation_cache"]) / f"diffuser-{config['dataset']}-{key}"
    with files.exclusive(place):
        return generate(config, items, ends, shaped_by["items"], model, place)


def train_baseline(
    config: Config, cache: Path, dataset: FlatDataset, test: bool = True
) -> RunResult:
    """The backbone alone on the raw data, from ``baseline_checkpoint`` or the cache, or trained.

    Args:
        config (Config): of ``--model=DiffuASR``.
        cache (Path): folder of the cache.
        dataset (FlatDataset): all interactions.
        test (bool): whether the test part is read.

    Returns:
        RunResult: its ``run_dir`` holds the checkpoint.

    Raises:
        UserError: if the checkpoint given is of other data.
    """
    place = config["baseline_checkpoint"]
    if place is not None:
        logger.info(f"baseline: {place}")
        path = checkpoint.resolve(place, BEST)
        tensors, content = load_run(path)
        check_same_data(path, tensors, content, dataset)
        theirs = content["config"]["values"].get("eval_args") or {}
        if content["config"]["model"] in WRAPPERS:
            raise UserError(f"{path} was trained on augmented data; a baseline must not be")
        if any(theirs.get(k) != config["eval_args"][k] for k in ("split", "group_by", "mode")):
            raise UserError(
                f"{path} was trained and evaluated with eval_args={theirs}; here they are "
                f"{config['eval_args']}, it may have seen what is held out and cannot be compared"
            )
        values = {k: config[k] for k in ("metrics", "topk", "valid_metric", "length_groups")}
        values |= {"use_gpu": config["use_gpu"], "show_progress": config["show_progress"]}
        values["data_path"] = config.data_root
        return evaluate(place, values, test)
    alone = config.backbone()
    fields = (dataset.uid_field, dataset.iid_field)
    data = files.digest({field: dataset.flat[field] for field in fields})
    run_dir = cache / f"{alone.name}-{config['dataset']}-{fingerprint(alone, data)}"
    logger.info(f"baseline: {alone.name} on the raw data, {run_dir}")
    return run_once(alone, run_dir, test=test)


def _recommender(config: Config, weights: Mapping[str, Tensor], result: RunResult) -> Any:
    """The trained baseline model, built from its own configuration."""
    stored = result.config
    if stored["model"] != config.name or stored["values"] != config.plain()["values"]:
        values = {**stored["values"], "data_path": config.data_root}
        values["use_gpu"] = config["use_gpu"]
        config = Config(stored["model"], stored["dataset"], overrides=values, origin=CHECKPOINT)
    model = build_run(config)[-1]
    load_model_state(model, checkpoint.subset(weights, "model"), Path(result.run_dir))
    return model.eval()


def export(augmented: Augmented, path: Path) -> None:
    """Write all interactions, pseudo-items in front, as an atomic ``.inter`` file.

    ``timestamp`` is the position within the user, so that the same leave-one-out split of the file
    holds out the same real items. Read it without ``rm_dup_inter``, which would drop a real item
    that is also a pseudo-item, and without filters by time.

    Args:
        augmented (Augmented): what ``augment`` returned, of a leave-one-out split.
        path (Path): file to write.
    """
    dataset, pseudo = augmented.dataset, augmented.pseudo
    held_out = 2 if dataset.config["eval_args"]["split"]["LS"] == "valid_and_test" else 1
    user_name = dataset.field2id_token[dataset.uid_field]
    item_name = dataset.field2id_token[dataset.iid_field]
    user, item = dataset.flat[dataset.uid_field], dataset.flat[dataset.iid_field]

    def write(name: str) -> None:
        with open(name, "w", encoding="utf-8") as file:
            file.write(
                f"{dataset.uid_field}:token\t{dataset.iid_field}:token\t{dataset.time_field}:float\n"
            )
            counts = torch.bincount(user, minlength=len(pseudo))
            previous, place = 0, 0
            for u, i in zip(user.tolist(), item.tolist(), strict=True):
                if u != previous:
                    previous, place = u, 0
                    # Of shorter histories a longer one would hold out more than was held out here.
                    enough = counts[u] >= held_out + 2
                    for drawn in pseudo[u][pseudo[u] > 0].tolist() if enough else []:
                        file.write(f"{user_name[u]}\t{item_name[drawn]}\t{place}\n")
                        place += 1
                file.write(f"{user_name[u]}\t{item_name[i]}\t{place}\n")
                place += 1

    files.write_atomically(path, write)
