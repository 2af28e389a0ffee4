"""ItemKNN: RecBole's similarities, summed over the history."""

from typing import Any

import pytest
import torch
from recbole.model.general_recommender import ItemKNN as RecBoleItemKNN

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.fitted import TrainingMatrix


@pytest.mark.parametrize("values", [{}, {"k": 2}, {"shrink": 5.0}])
def test_validation_scores_are_recboles(build: Any, values: dict[str, Any]) -> None:
    """There the history is the training part of the user."""
    config, train, valid, _, model = build("ItemKNN", MAX_ITEM_LIST_LENGTH=9, **values)
    model.fit(train._dataset)
    matrix = TrainingMatrix(train._dataset, config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
    peer = RecBoleItemKNN(config, matrix)
    compared = 0
    for batch, *_ in valid:
        expected = peer.full_sort_predict(batch).view(len(batch), -1)
        scores = model.full_sort_predict(batch)
        torch.testing.assert_close(scores, expected.to(scores))
        compared += int((scores > 0).sum())
    assert compared > 10


def test_an_item_that_occurs_twice_counts_twice(build: Any) -> None:
    _, train, _, _, model = build("ItemKNN")
    model.fit(train._dataset)
    once, twice = model.scores(torch.tensor([[1, 0], [1, 1]]))
    assert once.max() > 0
    torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"shrink": -1.0}, "shrink=-1.0 must be at least 0"),
        ({"knn_method": "user"}, "knn_method='user' is not one of item"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config("ItemKNN", "ml-100k", overrides=values)
