"""Pairs of first items and what follows them: training data of the generator."""

import torch
from torch import Tensor

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.diffuasr.generator import MIN_CONDITION, training_pairs
from recbole_simdiff.models.diffuasr.training import CONDITION, TARGET
from recbole_simdiff.modules.transformer import Batch

HELD_OUT = 20  # one user in so many is held out to choose the generator's best epoch

Pairs = tuple[Tensor, Tensor]  # targets [P, M] and conditions [P, L] of the generator


class PairLoader:
    """Batches of pairs, for ``PlanTrainer``.

    Each epoch has a random state of its own: its order comes first, then its steps, noise and
    dropout.

    Args:
        pairs (tuple): targets and conditions, on the host.
        batch_size (int): pairs a batch; the last one may be smaller.
        seed (int): of the random states.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int) -> None:
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.pairs[0]) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration.

        Args:
            epoch (int): from 0.
        """
        self.epoch = epoch

    def batches(self) -> list[tuple[int, Tensor]]:
        """Every batch of the current epoch: its number and the numbers of its pairs."""
        return list(enumerate(self._order().split(self.batch_size)))

    def collate(self, batch: tuple[int, Tensor]) -> Batch:
        """A batch: ``target`` [B, M] and ``condition`` [B, L]."""
        number, index = batch
        if number == 0:  # a resumed training has put back the states of the epoch before
            self._order()
        target, condition = self.pairs
        return Batch({TARGET: target[index], CONDITION: condition[index]})

    def _order(self) -> Tensor:
        """The order of the epoch's pairs; the random states are those that follow it."""
        torch.manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.pairs[0]))


def learning_pairs(config: Config, items: Tensor, ends: Tensor) -> tuple[Pairs, Pairs]:
    """What the generator learns from, and what is held out to choose its best epoch.

    Held out is one user in 20 and not one pair: with ``diffuasr_windows: all`` a user has several.

    Args:
        config (Config): of ``--model=DiffuASR``.
        items (LongTensor): training items of all users, [n].
        ends (LongTensor): where each user's end, [users].

    Returns:
        tuple: pairs to train on, on the host, and pairs held out, on the device (none with
        ``diffuasr_monitor: train_loss``).

    Raises:
        UserError: if fewer than two users have a history long enough.
    """
    users = users_to_learn_from(config, ends)
    generator = torch.Generator().manual_seed(config["seed"])
    users = users[torch.randperm(len(users), generator=generator)]
    n_held = len(users) // HELD_OUT if config["diffuasr_monitor"] == "heldout" else 0
    target, condition = _pairs_of(users[:n_held].sort().values, items, ends, config)
    held_out = target.to(config["device"]), condition.to(config["device"])
    return _pairs_of(users[n_held:].sort().values, items, ends, config), held_out


def users_to_learn_from(config: Config, ends: Tensor) -> Tensor:
    """Users whose training items make a pair, [users].

    Args:
        config (Config): of ``--model=DiffuASR``.
        ends (LongTensor): where each user's training items end, [users].

    Raises:
        UserError: if there are fewer than two.
    """
    minimum = config["n_pseudo"] + MIN_CONDITION
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    users = (lengths >= minimum).nonzero().squeeze(1)
    if len(users) < 2:
        raise UserError(
            f"n_pseudo={config['n_pseudo']}: {len(users)} users have the {minimum} training items "
            f"it takes to learn from (the longest history has {int(lengths.max())}); choose a "
            "smaller n_pseudo"
        )
    return users


def _pairs_of(users: Tensor, items: Tensor, ends: Tensor, config: Config) -> Pairs:
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))[users]
    part_ends = lengths.cumsum(0)
    row = torch.repeat_interleave(torch.arange(len(users)), lengths)
    position = torch.arange(len(row)) - (part_ends - lengths)[row]
    part = items[(ends[users] - lengths)[row] + position]
    longest, windows = config["MAX_ITEM_LIST_LENGTH"], config["diffuasr_windows"]
    return training_pairs(part, part_ends, config["n_pseudo"], longest, windows)
