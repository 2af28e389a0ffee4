"""The best items of a score or of a user's vector: exactly, or by an approximate search."""

import math
from typing import Any

import torch
from torch import Tensor

from recbole_simdiff.errors import UserError

SEARCHES = ("exact", "approximate")

# Lists of the index that a search reads. More find more of the best items, and take longer;
# docs/serving.md has figures.
N_PROBE = 64

# A search for more than this share of all items would read most of them: they are scored instead.
LARGEST_SHARE = 0.1

# Items to a list when the lists are made; faiss warns below 39.
_LEAST_TO_A_LIST = 39


def best(score: Tensor, ruled_out: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items that are not ruled out, and their scores.

    Args:
        score (Tensor): of all items, [n_items]; those ruled out are overwritten.
        ruled_out (BoolTensor): items that must not be chosen, [n_items].
        k (int): how many, if there are as many.
    """
    score[ruled_out] = -torch.inf
    top = score.topk(min(k, int((score > -torch.inf).sum())))
    return top.indices, top.values


class ApproximateIndex:
    """The table of items in lists of similar ones (faiss' IVF), of which a search reads a few.

    Args:
        table (Tensor): vectors of padding and all items, [n_items, H], on the CPU.

    Raises:
        UserError: if faiss is missing.
    """

    def __init__(self, table: Tensor) -> None:
        try:
            import faiss
        except ImportError:
            raise UserError(
                "search='approximate' needs faiss: pip install 'recbole_simdiff[ann]'"
            ) from None
        self._table = table.contiguous()
        n_items, width = table.shape
        lists = max(1, min(round(4 * math.sqrt(n_items)), n_items // _LEAST_TO_A_LIST))
        index: Any = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT
        )
        values = self._table.numpy()
        index.train(values)
        index.add(values)
        index.nprobe = N_PROBE
        self._index = index

    def best(self, vector: Tensor, ruled_out: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best items that are not ruled out, or nearly so, and their scores.

        Exact where little is left to choose from, or the search finds fewer than k.

        Args:
            vector (Tensor): of the user, [H].
            ruled_out (BoolTensor): items that must not be chosen, [n_items].
            k (int): how many, if there are as many.
        """
        n_found = k + int(ruled_out.sum())
        if n_found <= LARGEST_SHARE * len(self._table):
            values, numbers = self._index.search(vector.view(1, -1).numpy(), n_found)
            items, scores = torch.from_numpy(numbers[0]), torch.from_numpy(values[0])
            fit = items >= 0  # -1 where it found fewer
            fit &= ~ruled_out[items.clamp(min=0)]
            if int(fit.sum()) >= k:
                return items[fit][:k], scores[fit][:k]
        return best(self._table @ vector, ruled_out, k)
