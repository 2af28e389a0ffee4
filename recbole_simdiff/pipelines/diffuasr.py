"""Training on augmented data: the stages of DiffuASR (arXiv 2309.12858), cached one by one.

    baseline    the backbone alone, an ordinary run on the raw data: what a gain is measured
                against, and the recommender whose item table and judgement guide the generator
    diffuser    the generator, trained on the training interactions
    pseudo      invented items of each user, put in front of the training history
    final       the backbone again, on the augmented data

A stage is looked up in ``augmentation_cache`` under a key of everything that shaped it, so an
interrupted or changed command repeats only what it must. The generator sees training interactions
only: they are handed over as flat arrays that hold nothing else. The baseline's best epoch is
chosen on validation, as in any run.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recbole.utils import init_seed
from torch import Tensor
from tqdm import tqdm

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import (
    BEST,
    LAST,
    load_model_state,
    load_optimizer_state,
    optimizer_state,
)
from recbole_simdiff.config.config import CHECKPOINT, Config
from recbole_simdiff.data.dataset import FlatDataset, create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import Interrupted, TrainingDiverged, UserError, telling_memory
from recbole_simdiff.log import logger
from recbole_simdiff.models.diffuasr.generator import (
    GENERATION_KEYS,
    SAMPLING_KEYS,
    DiffuASR,
    averaged,
    check_width,
)
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.random_items import random_items, random_own
from recbole_simdiff.models.registry import WRAPPERS, build_model
from recbole_simdiff.pipelines.pairs import Pairs, _long_enough, learning_pairs
from recbole_simdiff.pipelines.report import _compared, format_quality
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.folder import logged
from recbole_simdiff.runs.identity import digest_of, fingerprint, source_checksum
from recbole_simdiff.runs.restore import check_same_data, evaluate
from recbole_simdiff.runs.result import RESULT, RunResult, read_result
from recbole_simdiff.runs.run import run_once, run_one
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.training import tracking
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Listener

SAVE_EVERY_SECONDS = 60

USERS = 2048  # users whose items are written between two looks at signals


class Augmented(NamedTuple):
    """Result of the stages before the last.

    Attributes:
        dataset (FlatDataset): all interactions.
        pseudo (LongTensor): invented items of each user, oldest first, 0 for none, [users, M].
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
        with logged(config), telling_memory(config):
            return _augment(config, test)
    except Interrupted as stop:
        stop.same_command = True
        raise


def _augment(config: Config, test: bool) -> Augmented:
    cache = Path(config["augmentation_cache"])
    dataset = create_dataset(config)
    train = create_loaders(config, dataset)[0]._dataset
    if not dataset.list_fields:
        raise UserError(
            "DiffuASR needs one interaction a line; benchmark_filename gives ready-made prefixes"
        )
    items, ends = train.training_items()
    data = files.digest({"items": items, "ends": ends})

    width = _check_backbone(config, train, ends)
    baseline = train_baseline(config, cache, dataset, test)
    weights, _ = checkpoint.load(checkpoint.resolve(baseline.run_dir, BEST))
    guide = files.digest(checkpoint.subset(weights, "model"))
    shaped_by = {
        "code": source_checksum(),
        "augmenter": config["augmenter"],
        "settings": {key: config[key] for key in GENERATION_KEYS},
        "seed": config["seed"],
        "data": data,
        "items": dataset.item_num,
        "width": width,
        "guide": guide,
    }
    if config["augmenter"] != "diffuasr":
        shaped_by |= {"settings": {"n_pseudo": config["n_pseudo"]}, "guide": ""}
    path = cache / f"{config['augmenter']}-{config['dataset']}-{digest_of(shaped_by)}.safetensors"
    model = _recommender(config.backbone(), weights, baseline)
    with files.exclusive(path):
        if path.is_file():
            logger.info(f"pseudo: {path}")
        else:
            pseudo, log = _invent(config, items, ends, dataset.item_num, model, shaped_by)
            checkpoint.save(path, {"pseudo": pseudo.int()}, {"shaped_by": shaped_by, "log": log})
            logger.info(f"pseudo: {path} written")
    tensors, content = checkpoint.load(path)
    if "pseudo" not in tensors or "log" not in content:
        raise checkpoint.foreign(path, "it lacks the invented items or their log")
    pseudo, log = tensors["pseudo"].long(), content["log"]

    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    limit = config["pseudo_max_history"]
    without = (lengths == 0) | ((lengths > limit) if limit else False)
    pseudo = pseudo.masked_fill(without.unsqueeze(1), 0)
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
        "quality": _compared(pseudo, items, ends, model, config["seed"]),
        "pseudo": str(path),
        "log": log,
        "seconds": baseline.seconds + sum(v for k, v in log.items() if k.endswith("_seconds")),
    }
    logger.info(format_quality(notes["quality"]))
    return Augmented(dataset, pseudo, notes)


def _check_backbone(config: Config, train: FlatDataset, ends: Tensor) -> int:
    """Width of the backbone's item table; refuse, before anything is trained, what cannot work."""
    alone = config.backbone()
    guide = Guide(build_model(alone, train), "cpu")
    width = guide.table().shape[1]
    if config["augmenter"] == "diffuasr":
        _long_enough(config, ends)
        check_width(width, len(config["sunet_channel_mult"]))
        if config["diffuasr_guidance"] == "classifier":
            guide.check(config["n_pseudo"])
    return width


def _invent(
    config: Config,
    items: Tensor,
    ends: Tensor,
    n_items: int,
    model: Any,
    shaped_by: Mapping[str, Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Invented items of each user, [users, M], and a log of how they came about."""
    if config["augmenter"] == "random":
        return random_items(items, ends, config["n_pseudo"], config["seed"]), {}
    if config["augmenter"] == "random_seq":
        return random_own(items, ends, config["n_pseudo"], config["seed"]), {}
    # What only sampling reads does not change the generator, unless it is trained with guidance.
    guided = config["diffuasr_guide_in_training"] or config["diffuasr_cf_training"] == "combined"
    settings = {k: config[k] for k in GENERATION_KEYS if guided or k not in SAMPLING_KEYS}
    key = digest_of({**shaped_by, "settings": settings})
    place = Path(config["augmentation_cache"]) / f"diffuser-{config['dataset']}-{key}"
    with files.exclusive(place):
        return generate(config, items, ends, n_items, model, place)


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


def generate(
    config: Config, items: Tensor, ends: Tensor, n_items: int, recommender: Any, place: Path
) -> tuple[Tensor, dict[str, Any]]:
    """Train the generator on the training interactions and write M items for every user.

    Args:
        config (Config): of ``--model=DiffuASR``.
        items (LongTensor): training items of all users, [n].
        ends (LongTensor): where each user's end, [users].
        n_items (int): number of ids, padding included.
        recommender (nn.Module): the trained baseline.
        place (Path): folder of the generator's checkpoints.

    Returns:
        tuple: ids [users, M], and a log of the training.

    Raises:
        UserError: if too few users have a history long enough to learn from.
        Interrupted: after a signal; the state is saved.
    """
    device, size, longest = config["device"], config["n_pseudo"], config["MAX_ITEM_LIST_LENGTH"]
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    pairs, held_out = learning_pairs(config, items, ends)
    init_seed(config["seed"], config["reproducibility"])
    guide = Guide(recommender, device)
    model = DiffuASR(config, n_items, guide, items.unique()).to(device)
    log = _train(config, model, pairs, held_out, place)
    logger.info(f"diffuser: writing {size} items for {int((lengths > 0).sum()):,} users")
    users = (lengths > 0).nonzero().squeeze(1)
    newest = ends[users]
    start = torch.maximum(newest - lengths[users], newest - longest)
    span = torch.arange(longest)
    inside = span < (newest - start).unsqueeze(1)
    history = items[torch.where(inside, start.unsqueeze(1) + span, 0)].masked_fill(~inside, 0)
    first = items[newest - lengths[users]]  # Sec. 3.4: the label is the first real item
    started = time.monotonic()
    pseudo = torch.zeros(len(ends), size, dtype=torch.long)
    stop = StopRequest()
    bar = tqdm(
        torch.arange(len(users)).split(USERS),
        desc="writing",
        leave=False,
        disable=None if config["show_progress"] else True,
    )
    with stop.listen():
        for part in bar:
            batch = [values[part].to(device) for values in (history, users, first)]
            written = model.generate(batch[0], batch[1], batch[2], config["seed"])
            pseudo[users[part]] = written.cpu()
            stop.check(place)
    log["generation_seconds"] = time.monotonic() - started
    return pseudo, log


class _Fitting:
    """The generator's training and all that a continued one needs.

    Attributes:
        state (dict): epochs trained, their seconds, best monitored loss and its epoch, and the
            losses of each epoch.
    """

    def __init__(self, config: Config, model: DiffuASR, last: Path) -> None:
        self.config, self.model, self.last = config, model, last
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=config["diffuasr_learning_rate"])
        decay = config["diffuasr_ema_decay"]
        self.average = averaged(model, decay) if decay else None
        self.best = _copy(model)
        self.state: dict[str, Any] = {
            "epoch": 0,
            "training_seconds": 0.0,
            "best": None,
            "best_epoch": 0,
        }
        self.state |= {"train": [], "held_out": []}
        if last.is_file():
            self._restore()

    def _restore(self) -> None:
        tensors, content = checkpoint.load(self.last)
        if lacking := {"optimizer", "state"} - content.keys():
            raise checkpoint.foreign(self.last, f"it lacks {min(lacking)}")
        load_model_state(self.model, checkpoint.subset(tensors, "model"), self.last)
        self.best = checkpoint.subset(tensors, "best")
        if self.average is not None:
            self.average.load_state_dict(checkpoint.subset(tensors, "average"))
        stored = checkpoint.subset(tensors, "optimizer")
        load_optimizer_state(self.optimizer, stored, content["optimizer"])
        self.state = content["state"]
        logger.info(f"diffuser: resumed at epoch {self.state['epoch']}")

    def save(self) -> None:
        values, content = optimizer_state(self.optimizer)
        groups = {"model": self.model.state_dict(), "best": self.best, "optimizer": values}
        groups["average"] = {} if self.average is None else self.average.state_dict()
        tensors = {f"{g}.{k}": v for g, part in groups.items() for k, v in part.items()}
        checkpoint.save(self.last, tensors, {"state": self.state, "optimizer": content})

    @property
    def finished(self) -> bool:
        """Whether all epochs are over, or too many without improvement."""
        waited = self.state["epoch"] - self.state["best_epoch"]
        return (
            self.state["epoch"] >= self.config["diffuasr_epochs"]
            or waited >= self.config["diffuasr_patience"]
        )

    def epoch(self, pairs: Pairs, held_out: Pairs) -> None:
        """One pass over the pairs, its losses noted, and the weights kept if they are the best.

        Raises:
            TrainingDiverged: if a loss is NaN or infinite.
        """
        state, started = self.state, time.monotonic()
        train_loss = monitored = self._pass(*pairs)
        chosen: Any = self.model if self.average is None else self.average.module
        if len(held_out[0]):
            monitored = chosen.fixed_noise_loss(*held_out, self.config["seed"])
            state["held_out"].append(monitored)
        state["train"].append(train_loss)
        state["epoch"] += 1
        if state["best"] is None or monitored < state["best"]:
            state["best"], state["best_epoch"] = monitored, state["epoch"]
            self.best = _copy(chosen)
        state["training_seconds"] += time.monotonic() - started

    def _pass(self, target: Tensor, condition: Tensor) -> float:
        """Mean loss over the pairs."""
        # Each epoch has a random state of its own, so that a resumed run repeats it exactly.
        torch.manual_seed(self.config["seed"] * 1_000_003 + self.state["epoch"])
        self.model.train()
        total = 0.0
        for index in torch.randperm(len(target)).split(self.config["diffuasr_batch_size"]):
            self.optimizer.zero_grad()
            loss = self.model.loss(target[index], condition[index])
            if not math.isfinite(loss.item()):
                raise TrainingDiverged(
                    f"the generator's loss is {loss.item()} at epoch {self.state['epoch']}; a "
                    "smaller diffuasr_learning_rate may help"
                )
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(index)
            if self.average is not None:
                self.average.update_parameters(self.model)
        return total / len(target)


def _copy(model: DiffuASR) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _train(
    config: Config, model: DiffuASR, pairs: Pairs, held_out: Pairs, place: Path
) -> dict[str, Any]:
    """Fit the generator; the weights of the best epoch are in ``model`` afterwards.

    Paper, Code: stop on the training loss. Here: on the loss of one user in 20 who is held out,
    with fixed noise, unless ``diffuasr_monitor: train_loss``.
    """
    n, n_held = len(pairs[0]), len(held_out[0])
    logger.info(
        f"diffuser: {n:,} pairs of {config['n_pseudo']} items and what follows them, "
        f"{n_held:,} held out"
    )
    cosine = model.mean_cosine()
    fitting = _Fitting(config, model, place / LAST)
    state, stop, saved = fitting.state, StopRequest(), time.monotonic()
    bar = tqdm(
        total=config["diffuasr_epochs"],
        initial=state["epoch"],
        desc="diffuser",
        leave=False,
        disable=None if config["show_progress"] else True,
    )
    with tracking.tracked(config, place) as tracked, stop.listen(), bar:
        tracked.send(_epochs(state))
        while not fitting.finished:
            fitting.epoch(pairs, held_out)
            tracked.send(_epochs(state))
            bar.update()
            losses = f"loss {state['train'][-1]:.4f} best {state['best']:.4f}"
            bar.set_postfix_str(losses, refresh=False)
            if stop.signum is not None or time.monotonic() - saved > SAVE_EVERY_SECONDS:
                fitting.save()
                saved = time.monotonic()
            stop.check(place)
        model.load_state_dict(fitting.best)
        fitting.save()
        tracked.on_end({"best_epoch": state["best_epoch"], "loss": state["best"]})
    logger.info(
        f"diffuser: best epoch {state['best_epoch']} of {state['epoch']}, training loss "
        f"{state['train'][state['best_epoch'] - 1]:.4f}"
        + (f", held out {state['best']:.4f}" if n_held else "")
        + f"; mean cosine of two items {cosine:.3f} before, {model.mean_cosine():.3f} after"
    )
    return {"pairs": n, "held_out_pairs": n_held, **state}


def _epochs(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The generator's log so far, as trackers know it."""
    held_out = [{"held_out": loss} for loss in state["held_out"]] or [{}] * state["epoch"]
    return [
        {"phase": "diffuser", "epoch": number, "loss": {"loss": loss}, "monitor": monitor}
        for number, (loss, monitor) in enumerate(zip(state["train"], held_out, strict=True))
    ]


def export(augmented: Augmented, path: Path) -> None:
    """Write all interactions, invented ones in front, as an atomic ``.inter`` file.

    ``timestamp`` is the position within the user, so that the same leave-one-out split of the file
    holds out the same real items. Read it without ``rm_dup_inter``, which would drop a real item
    that was also invented, and without filters by time.

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
                    for made in pseudo[u][pseudo[u] > 0].tolist() if enough else []:
                        file.write(f"{user_name[u]}\t{item_name[made]}\t{place}\n")
                        place += 1
                file.write(f"{user_name[u]}\t{item_name[i]}\t{place}\n")
                place += 1

    files.write_atomically(path, write)
