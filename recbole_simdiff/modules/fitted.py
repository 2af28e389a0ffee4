"""Models that are computed from the training interactions at once, without gradient steps."""

from abc import abstractmethod
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.modules.rules import require_choice


class FittedModel(SequentialModel):
    """Base of such models. Scores depend on the given history alone, so new users get some, too."""

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        SequentialModel.check_config(config)
        require_choice(config, {"loss_type": ("CE",)})

    def training_plan(self) -> list[Phase]:
        """One call of ``fit``."""
        return [Phase("fit", 1, fit=self.fit)]

    @abstractmethod
    def fit(self, dataset: Any) -> None:
        """Compute the model.

        Args:
            dataset (FlatDataset): the training part.
        """

    @abstractmethod
    def scores(self, item_seq: Tensor) -> Tensor:
        """Scores of all items for histories, [B, L] -> [B, n_items]."""

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Not part of this model's training.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{type(self).__name__} is computed by fit and has no loss")

    @torch.no_grad()
    def predict(self, interaction: Interaction) -> Tensor:
        """Score of each row's target, [B]."""
        target = interaction[self.ITEM_ID].unsqueeze(1)
        return self.scores(interaction[self.ITEM_SEQ]).gather(1, target).squeeze(1)

    @torch.no_grad()
    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items, [B, n_items]."""
        return self.scores(interaction[self.ITEM_SEQ])


def table(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Numbers that are computed, stored with the weights, and moved by no optimiser."""
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


class TrainingMatrix:
    """The training part as RecBole's models of sets of items read a data set.

    Args:
        dataset (FlatDataset): the training part.
        user_field, item_field (str): names of the ids.
    """

    def __init__(self, dataset: Any, user_field: str, item_field: str) -> None:
        items, ends = dataset.training_items()
        self._users = np.repeat(np.arange(len(ends)), np.diff(ends.numpy(), prepend=0))
        self._items = items.numpy()
        self._counts = {user_field: len(ends), item_field: dataset.item_num}

    def num(self, field: str) -> int:
        """Number of ids of a field, padding included."""
        return self._counts[field]

    def inter_matrix(self, form: str = "csr") -> sp.csr_matrix:
        """Counts of the interactions, users x items.

        Args:
            form (str): a sparse format of scipy.
        """
        ones = np.ones(len(self._items))
        matrix = sp.coo_matrix((ones, (self._users, self._items)), tuple(self._counts.values()))
        return matrix.asformat(form)
