"""Training of DiffuASR's generator, and the pseudo-items that it generates."""

import time
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed
from torch import Tensor
from tqdm.auto import tqdm

from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.evaluation.protocols import Metrics
from recbole_simdiff.log import logger
from recbole_simdiff.models.diffuasr.generator import DiffuASR
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.training import GeneratorTraining
from recbole_simdiff.pipelines.pairs import PairLoader, Pairs, learning_pairs
from recbole_simdiff.training import tracking
from recbole_simdiff.training.interrupt import StopRequest
from recbole_simdiff.training.progress import Progress, check_tensorboard
from recbole_simdiff.training.settings import FitSettings
from recbole_simdiff.training.trainer import PlanTrainer

USERS = 2048  # users whose items are generated between two looks at signals

HELD_OUT, TRAIN_LOSS = "held_out", "train_loss"  # what an epoch is judged by


def generate(
    config: Config, items: Tensor, ends: Tensor, n_items: int, recommender: Any, place: Path
) -> tuple[Tensor, dict[str, Any]]:
    """Train the generator on the training interactions and generate M items for every user.

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
        TrainingDiverged: if a loss is NaN or infinite.
        Interrupted: after a signal; the state is saved.
    """
    pairs, held_out = learning_pairs(config, items, ends)
    init_seed(config["seed"], config["reproducibility"])
    guide = Guide(recommender, config["device"])
    generator = DiffuASR(config, n_items, guide, items.unique()).to(config["device"])
    generator, log = train_generator(config, generator, pairs, held_out, place)
    started = time.monotonic()
    pseudo = _pseudo_items(config, generator, items, ends, place)
    log["generation_seconds"] = time.monotonic() - started
    return pseudo, log


def train_generator(
    config: Config, generator: DiffuASR, pairs: Pairs, held_out: Pairs, place: Path
) -> tuple[DiffuASR, dict[str, Any]]:
    """Train the generator from where its checkpoint stands, and take its best epoch.

    Paper, Code: stop on the training loss. Here: on the loss of one user in 20 who is held out,
    with fixed noise, unless ``diffuasr_monitor: train_loss`` or there are too few users.

    Args:
        config (Config): of ``--model=DiffuASR``.
        generator (DiffuASR): with its initial weights.
        pairs (tuple): to train on, see ``learning_pairs``.
        held_out (tuple): to validate with; may be empty.
        place (Path): folder of the checkpoints.

    Returns:
        tuple: the generator with the weights of its best epoch, and a log of the training.

    Raises:
        TrainingDiverged: if a loss is NaN or infinite.
        Interrupted: after a signal; the state is saved.
    """
    n, n_held = len(pairs[0]), len(held_out[0])
    logger.info(
        f"diffuser: {n:,} pairs of {config['n_pseudo']} items and what follows them, "
        f"{n_held:,} held out"
    )
    check_tensorboard()
    cosine = generator.mean_cosine()
    training = GeneratorTraining(config, generator)
    settings = _fit_settings(config, training, held_out)
    trainer = PlanTrainer(config, training, place, settings=settings)
    if (place / LAST).is_file():
        trainer.resume(place / LAST)
        logger.info(
            f"diffuser: resumed at epoch {trainer.progress.epoch}, step {trainer.progress.step}"
        )
    loader = PairLoader(pairs, config["diffuasr_batch_size"], config["seed"])
    with tracking.tracked(config, place) as tracked:
        tracked.send(trainer.progress.log)
        progress = trainer.fit(loader, show_progress=config["show_progress"], listeners=(tracked,))
        trainer.load_weights(place / BEST)
        log = {"pairs": n, "held_out_pairs": n_held, **_summary(progress)}
        tracked.on_end({"best_epoch": log["best_epoch"], "loss": log["best"]})
    logger.info(
        f"diffuser: best epoch {log['best_epoch']} of {log['epoch']}, training loss "
        f"{log['train'][log['best_epoch'] - 1]:.4f}"
        + (f", held out {log['best']:.4f}" if n_held else "")
        + f"; mean cosine of two items {cosine:.3f} before, "
        f"{training.result.mean_cosine():.3f} after"
    )
    return training.result, log


def _fit_settings(config: Config, training: GeneratorTraining, held_out: Pairs) -> FitSettings:
    """The generator's optimiser, patience and validation."""

    def validate(losses: Metrics) -> Metrics:
        if not len(held_out[0]):
            return {TRAIN_LOSS: sum(losses.values())}
        return {HELD_OUT: training.result.fixed_noise_loss(*held_out, config["seed"])}

    return FitSettings(
        learning_rate=config["diffuasr_learning_rate"],
        patience=config["diffuasr_patience"],
        metric=HELD_OUT if len(held_out[0]) else TRAIN_LOSS,
        validate=validate,
        remedy="A smaller diffuasr_learning_rate may help",
        log_every=max(1, config["diffuasr_epochs"] // 100),
    )


def _summary(progress: Progress) -> dict[str, Any]:
    """A finished training as the result holds it; epochs are counted from 1."""
    assert progress.best_epoch is not None
    held_out = [entry["valid"].get(HELD_OUT) for entry in progress.log]
    return {
        "epoch": len(progress.log),
        "training_seconds": progress.seconds,
        "best": progress.best_score,
        "best_epoch": progress.best_epoch + 1,
        "train": [sum(entry["loss"].values()) for entry in progress.log],
        "held_out": [loss for loss in held_out if loss is not None],
    }


def _pseudo_items(
    config: Config, generator: DiffuASR, items: Tensor, ends: Tensor, place: Path
) -> Tensor:
    """M items for every user with training items, 0 for the others, [users, M]."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    users = (lengths > 0).nonzero().squeeze(1)
    logger.info(f"diffuser: generating {config['n_pseudo']} items for {len(users):,} users")
    newest = ends[users]
    start = torch.maximum(newest - lengths[users], newest - config["MAX_ITEM_LIST_LENGTH"])
    position = torch.arange(config["MAX_ITEM_LIST_LENGTH"])
    inside = position < (newest - start).unsqueeze(1)
    history = items[torch.where(inside, start.unsqueeze(1) + position, 0)].masked_fill(~inside, 0)
    first = items[newest - lengths[users]]  # Sec. 3.4: the label is the first real item
    pseudo = torch.zeros(len(ends), config["n_pseudo"], dtype=torch.long)
    stop = StopRequest()
    bar = tqdm(
        torch.arange(len(users)).split(USERS),
        desc="generate",
        leave=False,
        disable=None if config["show_progress"] else True,
    )
    with stop.listen():
        for part in bar:
            rows, labels = (values[part].to(config["device"]) for values in (history, first))
            drawn = generator.generate(rows, users[part], labels, config["seed"])
            pseudo[users[part]] = drawn.cpu()
            stop.check(place)
    return pseudo
