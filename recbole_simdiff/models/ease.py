"""EASE: a linear model that predicts each item from the others, in closed form.

Paper: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, arXiv 1905.03375,
computed by RecBole's own code: B = P / -diag(P) with a zero diagonal, P = (X'X + reg_weight I)^-1,
X the users x items matrix of the training part.

Differences, tagged Paper / Code / Here.
    * Paper, Code: scores of a user's training items, X B. Here: of the history that is given, as
      for every sequential model, so the test sees the validation item, and new users get scores.

B has n_items x n_items numbers, and computing it takes four such tables.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.modules.fitted import FittedModel, TrainingMatrix, table
from recbole_simdiff.modules.rules import positive, require

RANGES = {"reg_weight": positive}


class EASE(FittedModel):
    """Score of an item: sum of its weights from the items of the history.

    Args:
        config (Config): resolved configuration, explained in properties/model/EASE.yaml.
        dataset (Dataset): the training dataset.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.reg_weight: float = config["reg_weight"]
        self._config = config
        self.weight = table(self.n_items, self.n_items)

    @staticmethod
    def check_config(config: Any) -> None:
        """Refuse impossible settings before any data is read.

        Raises:
            UserError: naming the key, its value and what is allowed.
        """
        FittedModel.check_config(config)
        require(config, RANGES)

    def fit(self, dataset: Any) -> None:
        """RecBole's solution on the training interactions."""
        # Not needed to recommend, and RecBole's package of these models imports scikit-learn.
        from recbole.model.general_recommender import ease

        solved = ease.EASE(self._config, TrainingMatrix(dataset, self.USER_ID, self.ITEM_ID))
        self.weight.copy_(torch.from_numpy(solved.item_similarity))

    def scores(self, item_seq: Tensor) -> Tensor:
        """Sums over the history; an item that occurs twice counts twice, [B, L] -> [B, n_items]."""
        return F.embedding_bag(item_seq, self.weight, mode="sum", padding_idx=0)
