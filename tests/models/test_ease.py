"""EASE: the closed form of its paper, summed over the history."""

from typing import Any

import numpy as np
import pytest
import torch
from recbole.model.general_recommender import ease

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.fitted import TrainingMatrix


def test_weights_are_the_papers(build: Any) -> None:
    """Eq. 8: off the diagonal -P_ij / P_jj; each item is predicted from the others."""
    _, train, _, _, model = build("EASE", reg_weight=3.0)
    model.fit(train._dataset)
    items, ends = train._dataset.training_items()
    counts = np.zeros((len(ends), train._dataset.item_num))
    begin = 0
    for user, end in enumerate(ends.tolist()):
        np.add.at(counts[user], items[begin:end].numpy(), 1)
        begin = end
    inverse = np.linalg.inv(counts.T @ counts + 3.0 * np.eye(counts.shape[1]))
    expected = -inverse / np.diag(inverse)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(model.weight.numpy(), expected, atol=1e-5)


def test_validation_scores_are_recboles(build: Any) -> None:
    """There the history is the training part of the user."""
    config, train, valid, _, model = build("EASE", MAX_ITEM_LIST_LENGTH=9)
    model.fit(train._dataset)
    matrix = TrainingMatrix(train._dataset, config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
    peer = ease.EASE(config, matrix)
    for batch, *_ in valid:
        expected = torch.as_tensor(peer.full_sort_predict(batch)).view(len(batch), -1)
        scores = model.full_sort_predict(batch)
        assert scores.std() > 0
        torch.testing.assert_close(scores, expected.to(scores))


def test_without_a_penalty_there_may_be_no_solution() -> None:
    with pytest.raises(UserError, match=r"reg_weight=0\.0 must be positive"):
        Config("EASE", "ml-100k", overrides={"reg_weight": 0})
