"""ItemKNN: items that occur with the same users as the items of the history.

RecBole's similarity (cosine of the columns of the users x items matrix, the ``k`` largest of each
item), computed by RecBole's own code, see Aiolli, "Efficient top-N recommendation for very large
scale binary rated datasets", RecSys 2013, doi:10.1145/2507157.2507189.

Differences, tagged Paper / Code / Here.
    * Code sums over a user's training items. Here: over the history that is given, as for every
      sequential model, so the test sees the validation item, and new users get scores.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from recbole_simdiff.modules.fitted import FittedModel, TrainingMatrix, table
from recbole_simdiff.modules.rules import at_least, require, require_choice

RANGES = {"k": at_least(1), "shrink": at_least(0)}

OPTIONS = {"knn_method": ("item",)}  # a neighbourhood of users has no scores for new histories


class ItemKNN(FittedModel):
    """Score of an item: sum of its similarities to the items of the history.

    Args:
        config (Config): resolved configuration, explained in properties/model/ItemKNN.yaml.
        dataset (Dataset): the training dataset.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.shrink: float = config["shrink"]
        self.knn_method: str = config["knn_method"]
        k = min(config["k"], self.n_items)
        self.neighbours = table(self.n_items, k, dtype=torch.int32)
        self.similarity = table(self.n_items, k)
        self._matrix: sp.csr_matrix | None = None

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        FittedModel.check_config(config)
        require(config, RANGES)
        require_choice(config, OPTIONS)

    def fit(self, dataset: Any) -> None:
        """RecBole's similarities; of each item the ``k`` largest, with 0 where there are fewer."""
        # Not needed to recommend, and RecBole's package of these models imports scikit-learn.
        from recbole.model.general_recommender.itemknn import ComputeSimilarity

        counts = TrainingMatrix(dataset, self.USER_ID, self.ITEM_ID).inter_matrix("csr")
        k = self.neighbours.shape[1]
        similarity = ComputeSimilarity(counts, k, self.shrink, self.knn_method)
        _, similar = similarity.compute_similarity()
        similar = similar.tocsc()
        count = np.diff(similar.indptr)
        row, column = np.repeat(np.arange(self.n_items), count), _places(count)
        self.neighbours.zero_()
        self.similarity.zero_()
        self.neighbours[row, column] = torch.from_numpy(similar.indices).to(self.neighbours)
        self.similarity[row, column] = torch.from_numpy(similar.data).to(self.similarity)
        self._matrix = None

    def scores(self, item_seq: Tensor) -> Tensor:
        """Sums over the history; an item that occurs twice counts twice, [B, L] -> [B, n_items]."""
        if self._matrix is None:
            ids, values = self.neighbours.cpu().numpy(), self.similarity.cpu().numpy()
            ends, n = np.arange(0, ids.size + 1, ids.shape[1]), self.n_items
            self._matrix = sp.csr_matrix((values.ravel(), ids.ravel(), ends), (n, n)).T.tocsr()
        items = item_seq.cpu().numpy()
        row, place = items.nonzero()
        shape = (len(items), self.n_items)
        history = sp.csr_matrix((np.ones(len(row), np.float32), (row, items[row, place])), shape)
        return torch.from_numpy((history @ self._matrix).toarray()).to(item_seq.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._matrix = None


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each group of the given sizes, [sum of counts]."""
    begin = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(begin, counts)
