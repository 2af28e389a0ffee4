"""Metrics by groups of test rows, and measures of augmented sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import PROTOCOLS
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.experiments.results import metric_of_rank
from recbole_simdiff.experiments.tables import grid, plain
from recbole_simdiff.modules.random_state import preserved_rng
from recbole_simdiff.runs.restore import RestoredRun, restore

# Column -> greatest value of each group but the last. An item with 0 training interactions occurs
# in no training history (cold start).
GROUPS = {"length": (5, 20), "train_count": (0, 5, 10, 20, 50)}


def tables(
    folders: Sequence[Path], name: str, metrics: Sequence[str], table_of: Path | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """An analysis of the runs of one row.

    Args:
        folders (Sequence): run folders; for ``views`` only the first is used.
        name (str): a column of ``GROUPS``, or ``views``.
        metrics (Sequence): such as ``ndcg@10``.
        table_of (Path | None): see ``views``.

    Returns:
        dict: title -> group or view -> measure -> value.

    Raises:
        UserError: if a run has no rankings, or its model has no augmented views.
    """
    if name == "views":
        return {f"augmented views of {folders[0].name}": views(folders[0], table_of)}
    return {
        f"test by {name}, {protocol}": by_group(folders, name, metrics, protocol)
        for protocol in PROTOCOLS
    }


def by_group(
    folders: Sequence[Path], column: str, metrics: Sequence[str], protocol: str
) -> dict[str, dict[str, float]]:
    """Mean test metrics of each group of rows, over all rows of several runs.

    Args:
        folders (Sequence): run folders, each with ``ranks.csv``.
        column (str): a column of ``GROUPS``: ``length`` of the input, or ``train_count``, the
            training interactions of the target.
        metrics (Sequence): such as ``ndcg@10``.
        protocol (str): one of ``PROTOCOLS``.

    Returns:
        dict: group, such as "6-20" -> metric -> value, and ``rows``, the number of rows.

    Raises:
        UserError: if a run has no rankings.
    """
    parts: list[pd.DataFrame] = []
    for folder in folders:
        path = folder / RANKS
        if not path.is_file():
            raise UserError(
                f"{path} does not exist; write it with evaluate --checkpoint={folder} "
                "--save_rankings=True"
            )
        ranks = pd.read_csv(path)
        rank = ranks[f"rank_{protocol.removeprefix('history ')}"].to_numpy()
        values = pd.DataFrame({m: metric_of_rank(rank, m) for m in metrics})
        edges = [-1, *GROUPS[column], np.inf]
        values["group"] = pd.cut(ranks[column], edges, labels=_names(GROUPS[column]))
        parts.append(values)
    grouped = pd.concat(parts).groupby("group", observed=True)
    means = grouped.mean()
    means.insert(0, "rows", grouped.size())
    return {str(group): dict(row) for group, row in means.iterrows()}


def _names(bounds: Sequence[int]) -> list[str]:
    lows = [0, *(bound + 1 for bound in bounds)]
    spans = [f"{a}-{b}" if a < b else str(b) for a, b in zip(lows, bounds, strict=False)]
    return [*spans, f"{lows[-1]}+"]


# ---------------------------------------------------------------------- augmented sequences


def views(run_dir: Path, table_of: Path | None = None) -> dict[str, dict[str, float]]:
    """Measures of a trained model's augmented sequences, over one epoch of training batches.

    Args:
        run_dir (Path): run of a model that replaces items: SimDiffRec, CaDiRec, ECLSR.
        table_of (Path | None): run whose item embeddings measure similarity; the same by default.

    Returns:
        dict: view -> measure -> value. Each view is also measured with random items in place of the
            new ones, under the name of the view with ``, random``.

            replaced          fraction of the items that differ from the source
            same row          fraction of the sequences that are equal to their source
            to original       mean cosine of a new item and the item it replaces
            to context        mean cosine of a new item and the mean of the other source items

    Raises:
        UserError: if the model replaces no items, or the tables have different items.
    """
    restored = restore(run_dir)
    model, train_data = restored.model.eval(), restored.loaders[0]
    device = restored.config["device"]
    with preserved_rng():
        any_views = model.augmented_views(next(iter(train_data)).to(device))
    if not any_views:
        raise UserError(f"{run_dir}: model={restored.config.name} replaces no items in its views")
    table = _table(restored)
    if table_of is not None:
        other = restore(table_of)
        if other.content["items"] != restored.content["items"]:
            raise UserError(f"{table_of} and {run_dir} were not trained on the same items")
        table = _table(other)
    generator = torch.Generator().manual_seed(0)
    sums: dict[str, Tensor] = {}
    for batch in tqdm(train_data, desc="views", leave=False, disable=None):
        source = batch[model.ITEM_SEQ]
        for name, view in model.augmented_views(batch.to(device)).items():
            view = view.cpu()[:, : source.shape[1]]
            drawn = torch.randint(1, len(table), view.shape, generator=generator)
            random = torch.where(view != source, drawn, source)
            for label, items in ((name, view), (f"{name}, random", random)):
                sums[label] = sums.get(label, torch.zeros(6, dtype=torch.float64)) + _sums(
                    source, items, table
                )
    return {label: _means(total) for label, total in sums.items()}


def _table(restored: RestoredRun) -> Tensor:
    table = restored.model.item_table
    if table is None:
        raise UserError(f"{restored.path}: model={restored.config.name} has no item embeddings")
    return F.normalize(table.detach().float().cpu(), dim=-1)


def _sums(source: Tensor, view: Tensor, table: Tensor) -> Tensor:
    """Counts and sums for ``_means``: items, replaced items, rows, equal rows, and both cosines."""
    changed = (source != view) & (source > 0) & (view > 0)
    row, position = changed.nonzero(as_tuple=True)
    old, new = table[source[row, position]], table[view[row, position]]
    real = (source > 0).unsqueeze(-1)
    total = (table[source] * real).sum(1)  # [B, H]
    context = F.normalize(total[row] - old, dim=-1)
    return torch.stack(
        [
            real.sum().float(),
            changed.sum().float(),
            torch.tensor(float(len(source))),
            (~changed.any(1)).sum().float(),
            (old * new).sum(),
            (context * new).sum(),
        ]
    )


def _means(total: Tensor) -> dict[str, float]:
    items, replaced, rows, equal, original, context = total.tolist()
    return {
        "replaced": replaced / max(items, 1),
        "same row": equal / max(rows, 1),
        "to original": original / max(replaced, 1),
        "to context": context / max(replaced, 1),
    }


def as_table(results: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """A Markdown table.

    Args:
        results (Mapping): label -> column -> value.
        first (str): header of the column of labels.
    """
    names = list(next(iter(results.values())))
    lines = [[first, *names]]
    for label, values in results.items():
        cells = (f"{values[n]:.0f}" if n == "rows" else f"{values[n]:.4f}" for n in names)
        lines.append([plain(label), *cells])
    return grid(lines)
