"""Counts that describe a data set, and those that others published."""

from dataclasses import dataclass
from dataclasses import field as attribute
from typing import NamedTuple

from recbole_simdiff.config.layers import properties_dir, read_yaml


@dataclass(frozen=True)
class Statistics:
    """Counts of a data set after filtering (paper Table 1).

    Attributes:
        pairs (int | None): actions without repeated (user, item) pairs; None if nobody counted.
        ties (int | None): actions whose user has an earlier one of the same time; None if nobody
            counted.
    """

    users: int
    items: int
    actions: int
    pairs: int | None = attribute(default=None, compare=False)
    ties: int | None = attribute(default=None, compare=False)

    @property
    def sparsity(self) -> float:
        """Share of the (user, item) pairs that do not occur."""
        pairs = self.actions if self.pairs is None else self.pairs
        return 1 - pairs / (self.users * self.items)

    def __str__(self) -> str:
        average = self.actions / self.users
        ties = "" if self.ties is None else f", {self.ties:,} equal times"
        return (
            f"{self.users:,} users, {self.items:,} items, {self.actions:,} actions, "
            f"average length {average:.2f}, sparsity {self.sparsity:.2%}{ties}"
        )


class PrefixStatistics(Statistics):
    """Counts of ready-made prefixes, which say nothing about the length of whole histories."""

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.actions:,} ready-made prefixes"


class Published(NamedTuple):
    """Statistics of a data set as somebody published them, and how they came about."""

    statistics: Statistics
    source: str
    note: str


def published(name: str) -> list[Published]:
    """What ``properties/statistics.yaml`` says about a data set; empty if nothing."""
    rows = read_yaml(properties_dir() / "statistics.yaml").get(name, [])
    return [
        Published(
            Statistics(row["users"], row["items"], row["actions"]), row["source"], row["note"]
        )
        for row in rows
    ]
