"""Similarity of the items within sequences: SimDiffRec's Figure 5 as a number and as points."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recbole_simdiff.errors import UserError
from recbole_simdiff.serving.recommender import load

MIN_ITEMS, MAX_ITEMS = 5, 30  # distinct items of a sequence that is shown


@dataclass(frozen=True)
class Sequences:
    """Item embeddings of a trained model and the histories of its users.

    Attributes:
        table (NDArray): unit vectors of the items, [items, H].
        number (dict): raw item id -> row of the table.
        histories (dict): user -> raw ids of distinct items, in order of first occurrence.
    """

    table: NDArray[np.float32]
    number: dict[str, int]
    histories: dict[str, list[str]]

    def items(self, user: str) -> list[str]:
        """The user's newest distinct items, at most ``MAX_ITEMS``."""
        return self.histories[user][-MAX_ITEMS:]

    def vectors(self, items: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """Unit vectors of all items of several sequences, [n, H]."""
        return self.table[[self.number[item] for sequence in items for item in sequence]]

    def similarity(self) -> float:
        """Cosine similarity of two different items of one sequence: mean over pairs, then users."""
        means = []
        for items in self.histories.values():
            n = len(items)
            if n > 1:
                # The squared norm of the sum counts each pair twice, and each item with itself.
                total = float(np.square(self.vectors([items]).sum(0, dtype=np.float64)).sum())
                means.append((total - n) / (n * (n - 1)))
        return float(np.mean(means))

    def shuffled(self, seed: int) -> "Sequences":
        """The same sequences with every item replaced by one drawn from all interactions."""
        generator = np.random.default_rng(seed)
        pool = [item for items in self.histories.values() for item in items]
        drawn = iter(generator.permutation(len(pool)))
        histories = {
            user: list(dict.fromkeys(pool[next(drawn)] for _ in items))
            for user, items in self.histories.items()
        }
        return replace(self, histories=histories)

    def sample(self, n: int, seed: int) -> list[str]:
        """Draw users with at least ``MIN_ITEMS`` distinct items.

        Args:
            n (int): number of users; all if there are fewer.
            seed (int): of the draw.

        Raises:
            UserError: if there are none.
        """
        users = [user for user, items in self.histories.items() if len(items) >= MIN_ITEMS]
        if not users:
            raise UserError(f"no user has {MIN_ITEMS} different items to show")
        return list(np.random.default_rng(seed).permutation(users)[:n])


def sequences(run_dir: Path) -> Sequences:
    """Item embeddings and histories of a run's best epoch.

    Raises:
        UserError: if the model has no table of item embeddings.
    """
    recommender = load(run_dir, use_gpu=False)
    table = recommender.model.item_table
    if table is None:
        raise UserError(f"{run_dir}: model={recommender.config.name} has no item embeddings")
    vectors = table.detach().float().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return Sequences(
        vectors / np.maximum(lengths, 1e-12),
        {item: i for i, item in enumerate(recommender.item_ids) if i},
        {user: list(dict.fromkeys(recommender.history(user))) for user in recommender.users},
    )
