"""RecBole's metrics of coverage and popularity, over what can be recommended.

RecBole 1.2.1 counts padding among the items there are, and what fills up a list when fewer than k
items can be ranked. Here item 0 in a list stands for no item, lists may be shorter than k, and the
items there are leave padding out.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.evaluator import metrics

Lists = NDArray[np.int64]  # items ranked first, best first, 0 after the last one, [rows, k]


class ItemCoverage(metrics.ItemCoverage):
    """Share of the items that are in any list."""

    def get_coverage(self, item_matrix: Lists, num_items: int) -> float:
        """See RecBole; ``num_items`` counts padding."""
        return float(super().get_coverage(item_matrix[item_matrix > 0], num_items - 1))


class GiniIndex(metrics.GiniIndex):
    """How unequally often the items are in lists: 0 for all alike."""

    def get_gini(self, item_matrix: Lists, num_items: int) -> float:
        """See RecBole; ``num_items`` counts padding."""
        return float(super().get_gini(item_matrix[item_matrix > 0][None], num_items - 1))


class ShannonEntropy(metrics.ShannonEntropy):
    """Entropy of how often the items are in lists, in nats.

    RecBole's documentation has this formula; its code divides it by the number of items.
    """

    def get_entropy(self, item_matrix: Lists) -> float:
        """See RecBole."""
        count = np.unique(item_matrix[item_matrix > 0], return_counts=True)[1]
        share = count / count.sum()
        return float(-(share * np.log(share)).sum())


def _of_items(values: NDArray[Any], lists: Lists) -> NDArray[np.float64]:
    """Values with NaN where there is no item."""
    return np.where(lists > 0, values, np.nan)


def _mean_of_first(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the first 1, 2, ... values of each row, as far as there are items, [rows, k]."""
    return np.nancumsum(values, axis=1) / (~np.isnan(values)).cumsum(axis=1).clip(min=1)


class AveragePopularity(metrics.AveragePopularity):
    """Training interactions of a recommended item, mean over each list and over lists."""

    def get_pop(self, item_matrix: Lists, item_count: Mapping[int, int]) -> NDArray[np.float64]:
        """See RecBole."""
        return _of_items(super().get_pop(item_matrix, item_count), item_matrix)

    def metric_info(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See RecBole."""
        return _mean_of_first(values)


class TailPercentage(metrics.TailPercentage):
    """Share of each list that is among the items trained on least, mean over lists."""

    def get_tail(self, item_matrix: Lists, count_items: Mapping[int, int]) -> NDArray[np.float64]:
        """See RecBole."""
        return _of_items(super().get_tail(item_matrix, count_items), item_matrix)

    def metric_info(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See RecBole."""
        return _mean_of_first(values)


COVERAGE = {
    one.__name__.lower(): one
    for one in (ItemCoverage, GiniIndex, ShannonEntropy, AveragePopularity, TailPercentage)
}
