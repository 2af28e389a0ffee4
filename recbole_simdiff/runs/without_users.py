"""Checkpoints that hold nothing of the users they were trained on (``without_users``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.modules.random_state import preserved_rng
from recbole_simdiff.runs.histories import history_scores
from recbole_simdiff.runs.stored import load_run

# What is kept of the JSON content; of the configuration, not where things were on the machine.
_KEPT = (
    "config",
    "versions",
    "statistics",
    "items",
    "titles",
    "ready_rows",
    "progress",
    "own_model",
)

_PLACES = ("data_path", "checkpoint_dir", "init_from", "epochs_from", "augmentation_cache")

# The model is built otherwise where these are given: their last part is kept.
_NAMED = ("baseline_checkpoint", "item_table", "item_vectors")


def check_history_only(config: Config, model: Any) -> None:
    """Refuse ``without_users`` for a model that reads users, before it is trained.

    Args:
        config (Config): resolved configuration.
        model (SequentialModel): new, on its device; its mode and random states stay as they are.

    Raises:
        UserError: if it scores from more than histories.
    """
    if not config["without_users"]:
        return
    training = model.training
    try:
        with torch.no_grad(), preserved_rng():
            history_scores(config, model.eval(), [[1]])
    except UserError as error:
        raise UserError(f"without_users=True: {error}", keys=("without_users", "model")) from error
    finally:
        model.train(training)


def users_left_out(
    tensors: Mapping[str, Tensor], content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and content of a checkpoint without users, histories and state of training.

    Kept are the model, its configuration and log, ids and titles of items, and how often each item
    occurs.

    Args:
        tensors (Mapping), content (Mapping): of the checkpoint.
    """
    kept: dict[str, Tensor] = {k: v for k, v in tensors.items() if k.startswith("model.")}
    if "data.item_counts" in tensors:
        kept["data.item_counts"] = tensors["data.item_counts"]
    elif "data.history_items" in tensors:
        items = tensors["data.history_items"].long()
        kept["data.item_counts"] = torch.bincount(items, minlength=len(content["items"]))
    values = {k: v for k, v in content["config"]["values"].items() if k not in _PLACES}
    values |= {k: Path(values[k]).name for k in _NAMED if values.get(k) is not None}
    left = {key: content[key] for key in _KEPT if key in content}
    left["config"] = {**content["config"], "values": values}
    left["users"] = content["users"][:1]  # [PAD]
    left["n_users"] = content.get("n_users", len(content["users"]))
    return kept, left


def leave_out_users(run_dir: Path) -> None:
    """Strip ``best`` of a finished run, and remove ``last``, from which it could be resumed.

    Args:
        run_dir (Path): its folder.
    """
    checkpoint.save(run_dir / BEST, *users_left_out(*load_run(run_dir / BEST)))
    (run_dir / LAST).unlink()
    logger.info(f"without_users: {BEST} holds no users and histories, and {LAST} is removed")
