"""Histories given as numbers of items, as a model reads and scores them."""

from collections.abc import Sequence
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError


def history_batch(config: Config, histories: Sequence[Sequence[int]]) -> Interaction:
    """The newest items of each history, right-padded with 0, on the model's device.

    Args:
        config (Config): of the model.
        histories (Sequence): numbers of items, oldest first.
    """
    length = config["MAX_ITEM_LIST_LENGTH"]
    seq = torch.zeros(len(histories), length, dtype=torch.long)
    for row, items in enumerate(histories):
        recent = torch.tensor(items[-length:])
        seq[row, : len(recent)] = recent
    field = config["ITEM_ID_FIELD"]
    batch = Interaction(
        {field + config["LIST_SUFFIX"]: seq, config["ITEM_LIST_LENGTH_FIELD"]: (seq != 0).sum(1)}
    )
    return batch.to(config["device"])


def history_scores(config: Config, model: Any, histories: Sequence[Sequence[int]]) -> Tensor:
    """Scores of all items and perhaps further tokens for histories alone, [B, at least n_items].

    Args:
        config (Config): of the model.
        model (SequentialModel): in evaluation mode, on its device.
        histories (Sequence): numbers of items, oldest first.

    Raises:
        UserError: if the model reads more than histories.
    """
    try:
        scores: Tensor = model.full_sort_predict(history_batch(config, histories))
    except KeyError as error:
        raise UserError(
            f"model={config.name} reads {error} besides the history, so it cannot "
            "recommend from a checkpoint alone. Use the evaluate command"
        ) from error
    return scores.view(len(histories), -1)
