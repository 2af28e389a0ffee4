"""Quality of pseudo-items, and metrics with and without them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.models.diffuasr.guide import Guide
from recbole_simdiff.models.diffuasr.random_items import random_from_history, random_items
from recbole_simdiff.runs.result import RunResult, aligned, format_table


def quality(pseudo: Tensor, items: Tensor, ends: Tensor, table: Tensor) -> dict[str, float]:
    """Measures of pseudo-items against the users' real items.

    Args:
        pseudo (LongTensor): pseudo-items, 0 for none, [users, M].
        items (LongTensor): training items of all users, [n].
        ends (LongTensor): where each user's end, [users].
        table (Tensor): item embeddings of a trained recommender, [n_items, d].

    Returns:
        dict: ``similarity``, mean cosine between a pseudo-item and the mean of its user's real
        ones; ``popularity``, its mean share of training interactions times the number of items
        (1 for uniform draws); ``never generated``, share of the items that are no pseudo-item;
        ``own item``, share of pseudo-items that the user's training history holds (and is trained
        to predict).
    """
    n_items = len(table)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    owner = torch.repeat_interleave(torch.arange(len(ends)), lengths)
    user = (pseudo[:, 0] > 0).nonzero().squeeze(1)
    if not len(user):
        return {}
    pseudo = pseudo[user]
    table = F.normalize(table.float(), dim=-1)
    mean = F.normalize(F.embedding_bag(items, table, ends - lengths, mode="sum"), dim=-1)
    similarity = torch.stack(
        [(table[pseudo[:, j]] * mean[user]).sum(-1).mean() for j in range(pseudo.shape[1])]
    )
    share = torch.bincount(items, minlength=n_items).double() / len(items) * (n_items - 1)
    seen = torch.isin(user.unsqueeze(1) * n_items + pseudo, owner * n_items + items)
    return {
        "similarity": similarity.mean().item(),
        "popularity": share[pseudo].mean().item(),
        "never generated": 1 - len(pseudo.unique()) / (n_items - 1),
        "own item": seen.double().mean().item(),
    }


def compared_quality(
    pseudo: Tensor, items: Tensor, ends: Tensor, model: Any, seed: int
) -> dict[str, dict[str, float]]:
    """Quality of pseudo-items, and of those of the two random augmenters for the same users.

    Args:
        pseudo (LongTensor): pseudo-items, 0 for none, [users, M].
        items (LongTensor): training items of all users, [n].
        ends (LongTensor): where each user's end, [users].
        model (SequentialModel): the trained baseline, for its item table.
        seed (int): the random augmenters draw with the next one.

    Returns:
        dict: augmenter -> measure -> value, see ``quality``.
    """
    table = Guide(model, torch.device("cpu")).table()
    size, none = pseudo.shape[1], pseudo[:, :1] == 0
    augmenters = {
        "this augmenter": pseudo,
        "random": random_items(items, ends, size, seed + 1).masked_fill(none, 0),
        "random_seq": random_from_history(items, ends, size, seed + 1).masked_fill(none, 0),
    }
    return {name: quality(drawn, items, ends, table) for name, drawn in augmenters.items()}


def format_quality(compared: Mapping[str, Mapping[str, float]]) -> str:
    """Rows augmenter, columns measure."""
    names = list(next(iter(compared.values())))
    rows = [["pseudo-items", *names]]
    rows += [[name, *(f"{values[n]:.3f}" for n in names)] for name, values in compared.items()]
    return aligned(rows, 1)


def format_report(result: RunResult) -> str:
    """Test metrics by input length, with and without augmentation, the history kept.

    A baseline that is another model than the backbone is named.
    """
    notes = result.augmentation
    baseline = notes["baseline"]
    other = "" if baseline["model"] == notes["backbone"] else f" ({baseline['model']})"
    parts = {"all": (kept(baseline["test"]), kept(result.test))}
    for group, values in result.by_length.items():
        parts[f"{group} ({values['rows']:.0f})"] = baseline["by_length"].get(group, {}), values
    tables = {}
    for name, (without, values) in parts.items():
        # Evaluated at other cutoffs, there is nothing to compare with.
        rows = {f"without{other}": without} if without.keys() == values.keys() else {}
        tables[name] = {
            k: {m: v for m, v in part.items() if m != "rows"}
            for k, part in (rows | {"with": values}).items()
        }
    return format_table(tables, result.digits, ("input length", "augmentation"))
