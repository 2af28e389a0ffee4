"""Pop: the items that occur most in the training part, the same for everybody.

RecBole 1.2.1 has a Pop; its counts leave out all but one occurrence of an item in a batch (an
indexed assignment, where an indexed addition is needed), so they depend on the batch size. Here
every training interaction counts.
"""

from typing import Any

import torch
from torch import Tensor

from recbole_simdiff.modules.fitted import FittedModel, table


class Pop(FittedModel):
    """Score of an item: its share of the training interactions of the most frequent item.

    Args:
        config (Config): resolved configuration.
        dataset (Dataset): the training dataset.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.popularity = table(self.n_items)

    def fit(self, dataset: Any) -> None:
        """Count the training interactions of each item."""
        items, _ = dataset.training_items()
        counts = torch.bincount(items, minlength=self.n_items)
        self.popularity.copy_(counts / counts.max())

    def scores(self, item_seq: Tensor) -> Tensor:
        """The same for every history, [B, L] -> [B, n_items]."""
        return self.popularity.expand(len(item_seq), -1).clone()
