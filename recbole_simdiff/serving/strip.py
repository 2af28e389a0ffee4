"""A checkpoint without the users it was trained on, which may be given to others."""

from pathlib import Path

import torch
from torch import Tensor

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.serving.recommender import load

# What is kept of the JSON content; of the configuration, not where things were on the machine.
_KEPT = ("config", "versions", "statistics", "items", "titles", "ready_rows", "progress")

_PLACES = ("data_path", "checkpoint_dir")


def strip(place: str | Path, path: Path) -> None:
    """Write a checkpoint that recommends to histories and holds no user, history or state.

    Kept are the model, its configuration and log, ids and titles of items, and how often each item
    occurs, for the fallback. It cannot be resumed or evaluated.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        path (Path): the file to write, a .safetensors file.

    Raises:
        UserError: if the checkpoint cannot be used, its model reads users, or the file to write is
            the checkpoint itself.
    """
    source = checkpoint.resolve(place, BEST)
    if path.suffix != ".safetensors":
        raise UserError(f"--output={path} must end in .safetensors")
    if path.exists() and path.samefile(source):
        raise UserError(f"--output={path} is the checkpoint itself; name another file")
    recommender = load(source, use_gpu=False)
    recommender.recommend([recommender.item_ids[1:2]], k=1)  # a model that reads users is refused
    tensors, content = load_run(source)
    kept: dict[str, Tensor] = {k: v for k, v in tensors.items() if k.startswith("model.")}
    if "data.item_counts" in tensors:
        kept["data.item_counts"] = tensors["data.item_counts"]
    elif "data.history_items" in tensors:
        items = tensors["data.history_items"].long()
        kept["data.item_counts"] = torch.bincount(items, minlength=len(content["items"]))
    values = {k: v for k, v in content["config"]["values"].items() if k not in _PLACES}
    left = {key: content[key] for key in _KEPT if key in content}
    left["config"] = {**content["config"], "values": values}
    left["users"] = content["users"][:1]  # [PAD]
    left["n_users"] = content.get("n_users", len(content["users"]))
    checkpoint.save(path, kept, left)
