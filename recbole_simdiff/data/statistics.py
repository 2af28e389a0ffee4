"""Counts that describe a data set."""

from dataclasses import dataclass
from dataclasses import field as attribute


@dataclass(frozen=True)
class Statistics:
    """Counts of a data set after filtering (paper Table 1).

    Attributes:
        pairs (int | None): actions without repeated (user, item) pairs; None if nobody counted.
    """

    users: int
    items: int
    actions: int
    pairs: int | None = attribute(default=None, compare=False)

    @property
    def sparsity(self) -> float:
        """Share of the (user, item) pairs that do not occur."""
        pairs = self.actions if self.pairs is None else self.pairs
        return 1 - pairs / (self.users * self.items)

    def __str__(self) -> str:
        average = self.actions / self.users
        return (
            f"{self.users:,} users, {self.items:,} items, {self.actions:,} actions, "
            f"average length {average:.2f}, sparsity {self.sparsity:.2%}"
        )


class PrefixStatistics(Statistics):
    """Counts of ready-made prefixes, which say nothing about the length of whole histories."""

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.actions:,} ready-made prefixes"
