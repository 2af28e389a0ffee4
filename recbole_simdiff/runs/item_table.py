"""The item embeddings of a trained run, taken as the fixed ones of another (``item_table``)."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.diffusion.whitening import whiten
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.restore import check_same_data
from recbole_simdiff.runs.stored import load_run


class TrainedItems(NamedTuple):
    """Item embeddings in a checkpoint.

    Attributes:
        path (Path): the checkpoint.
        tensors (dict): its tensors.
        content (dict): its JSON content.
        table (Tensor): embeddings of padding and all items, [N, d].
    """

    path: Path
    tensors: dict[str, Tensor]
    content: dict[str, Any]
    table: Tensor


def asks_for_table(config: Config) -> bool:
    """Whether ``item_table`` names a run to be read.

    It does not where a checkpoint gave the setting: that checkpoint holds the embeddings.
    """
    given = "item_table" in config and config["item_table"] is not None
    return given and not config.is_stored("item_table")


def trained_items(place: str) -> TrainedItems:
    """Read the item embeddings of a run; its model is not built.

    Args:
        place (str): a run folder (its best epoch) or a checkpoint file.

    Raises:
        UserError: if there is no usable checkpoint, or its model has no item embeddings.
    """
    path = checkpoint.resolve(place, BEST)
    tensors, content = load_run(path)
    n_items = len(content["items"])
    table = tensors.get("model.item_embedding.weight", torch.zeros(0))
    if table.dim() != 2 or len(table) < n_items or not table.isfinite().all():
        raise UserError(
            f"item_table={place}: model={content['config']['model']} has no embedding for each of "
            f"its {n_items - 1} items. Give a run of an encoder such as SASRecCE",
            keys=("item_table",),
        )
    return TrainedItems(path, tensors, content, table[:n_items])


def table_checksum(config: Config) -> dict[str, str]:
    """What the read table adds to the name of a result: its checksum, or nothing without one.

    Raises:
        UserError: if the run that ``item_table`` names cannot be used.
    """
    if not asks_for_table(config):
        return {}
    return {"item_table": files.digest({"table": trained_items(config["item_table"]).table})}


def install_item_table(config: Config, dataset: FlatDataset, model: Any) -> str:
    """Put the whitened embeddings of the run that ``item_table`` names, if any, into a new model.

    Args:
        config (Config): configuration of the model.
        dataset (FlatDataset): all interactions; must be those the run was trained on.
        model (SequentialModel): its ``item_table`` is overwritten.

    Returns:
        str: what was taken, for the log; empty for nothing.

    Raises:
        UserError: if the run's checkpoint cannot be used, or data, split or width differ.
    """
    if not asks_for_table(config):
        return ""
    items = trained_items(config["item_table"])
    check_same_data(items.path, items.tensors, items.content, dataset)
    _check_fit(items, config)
    try:
        white = whiten(items.table)
    except ValueError as error:
        raise UserError(
            f"item_table={items.path} cannot be whitened: {error}", keys=("item_table",)
        ) from None
    with torch.no_grad():
        model.item_table.copy_(white)
    before = items.table[1:].double().std(0)
    return (
        f"item_table: the {len(white) - 1:,} item embeddings of {items.content['config']['model']} "
        f"in {items.path}, {white.shape[1]} dimensions, whitened (standard deviations before: "
        f"{before.min():.3g} to {before.max():.3g}) and frozen"
    )


def _check_fit(items: TrainedItems, config: Config) -> None:
    """Refuse embeddings of another width, or trained on what may be held out here."""
    theirs = items.content["config"]["values"].get("eval_args") or {}
    if any(theirs.get(key) != config["eval_args"][key] for key in ("split", "group_by")):
        raise UserError(
            f"item_table={items.path} was trained with eval_args={theirs}; here they are "
            f"{config['eval_args']}, so it may have seen what is held out",
            keys=("item_table", "eval_args"),
        )
    size = items.table.shape[1]
    if size != config["hidden_size"]:
        raise UserError(
            f"hidden_size={config['hidden_size']} must be {size}, the dimensions of the embeddings "
            f"in item_table={items.path}",
            keys=("hidden_size", "item_table"),
        )
