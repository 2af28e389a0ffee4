"""The best items of a score or of a user's vector: exactly, or by an approximate search."""

import math
from typing import Any

import torch
from torch import Tensor

from recbole_simdiff.errors import UserError

SEARCHES = ("exact", "approximate")

# Lists of the index that a search reads. More find more of the best items, and take longer;
# docs/serving.md has figures.
N_PROBE = 192

# A search for more than this share of all items would read most of them: they are scored instead.
LARGEST_SHARE = 0.1

# Items to a list when the lists are made (faiss warns below 39), the most of them that are looked
# at, and how often. More of the last two take longer and find no more.
_LEAST_TO_A_LIST, _MOST_TO_A_LIST, _ROUNDS = 39, 64, 10


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

    Lists are made by distance. So that the nearest item is the one with the largest product, each
    vector x gets one more number, sqrt(m - |x|^2) with m the largest |x|^2, and a user's vector
    a 0: their squared distance is then |user|^2 + m - 2 user . x.

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
        index: Any = faiss.IndexIVFFlat(faiss.IndexFlatL2(width + 1), width + 1, lists)
        index.cp.max_points_per_centroid, index.cp.niter = _MOST_TO_A_LIST, _ROUNDS
        square = self._table.square().sum(1, keepdim=True)
        values = torch.cat([self._table, (square.max() - square).sqrt()], 1).numpy()
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
            point = torch.cat([vector, vector.new_zeros(1)]).view(1, -1)
            items = torch.from_numpy(self._index.search(point.numpy(), n_found)[1][0])
            items = items[items >= 0]  # -1 where it found fewer
            items = items[~ruled_out[items]][:k]
            if len(items) == k:
                scores = (self._table[items] @ vector).sort(descending=True, stable=True)
                return items[scores.indices], scores.values
        return best(self._table @ vector, ruled_out, k)
