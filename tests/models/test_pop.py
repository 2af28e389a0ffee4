"""Pop: every training interaction counts, and nothing later."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_inter


def counts_of_training(histories: dict[str, list[str]]) -> Counter[str]:
    """Leave-one-out holds out the last two of each user."""
    return Counter(item for items in histories.values() for item in items[:-2])


HISTORIES = {
    "a": ["x", "x", "y", "z", "z"],
    "b": ["x", "y", "z", "z", "z"],
    "c": ["w", "x", "w", "v", "v"],
}


def test_scores_are_shares_of_the_most_frequent_item(build: Any, data_path: Path) -> None:
    write_inter(data_path, "few", HISTORIES)
    _, train, _, test, model = build("Pop", "few", topk=[1], valid_metric="NDCG@1")
    model.fit(train._dataset)
    batch = next(iter(test))[0]
    scores, counts = model.full_sort_predict(batch), counts_of_training(HISTORIES)
    names = train._dataset.item_ids
    assert scores.shape == (len(batch), len(names))
    for number, name in enumerate(names[1:], start=1):
        expected = counts[name] / max(counts.values())
        assert scores[:, number].tolist() == pytest.approx([expected] * len(batch))


def test_the_size_of_batches_plays_no_part(build: Any, data_path: Path) -> None:
    """RecBole's counts depend on it."""
    write_inter(data_path, "few", HISTORIES)
    tables = []
    for size in (1, 64):
        values = {"topk": [1], "valid_metric": "NDCG@1", "train_batch_size": size}
        _, train, _, _, model = build("Pop", "few", **values)
        model.fit(train._dataset)
        tables.append(model.popularity)
    assert torch.equal(*tables)
