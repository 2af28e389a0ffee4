"""The weights of a former run as the start of a new one on other users and items (``init_from``).

A tensor has a row for each item or each user if a model of more items or users has more rows in
it; its rows are carried over by raw id. All other tensors are carried over whole. A new item starts
as the mean of the known items that its users have in their training parts; or, with
``item_vectors``, as its vector. Rows for which there is neither stay as they were drawn.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import KEYS
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import WRAPPERS, build_model
from recbole_simdiff.modules.random_state import preserved_rng
from recbole_simdiff.runs.stored import load_run

_TABLE = "item_embedding.weight"  # where ``item_vectors`` go
_MORE = {"items": 1, "users": 2}  # in the larger model that tells which tensors have their rows
_NEITHER = "neither"  # has such rows, but the tensor grows in another way


class _Ids(NamedTuple):
    """Raw ids of a run and of the new data.

    Attributes:
        n_there, n_here (int): how many, padding included.
        source (LongTensor): number there of each id here, -1 for a new one, [n_here].
    """

    n_there: int
    n_here: int
    source: Tensor

    @staticmethod
    def of(there: Sequence[str], here: Sequence[str], n_there: int = 0) -> "_Ids":
        number = {raw: i for i, raw in enumerate(there)}
        source = torch.tensor([number.get(raw, -1) for raw in here])
        return _Ids(n_there or len(there), len(here), source)

    @property
    def known(self) -> Tensor:
        """Whether each id was there, [n_here]."""
        return self.source >= 0

    @property
    def n_new(self) -> int:
        """How many were not there."""
        return int((~self.known).sum())

    def fit(self, there: Tensor, here: Tensor) -> bool:
        """Whether two tensors with a row for each id have as many further rows, and equal ones."""
        extra = len(here) - self.n_here
        return there.shape == (self.n_there + extra, *here.shape[1:])

    def carried(self, there: Tensor, here: Tensor) -> Tensor:
        """``here`` with the rows of known ids, and those after all ids, from ``there``."""
        rows = here.clone()
        rows[: self.n_here][self.known] = there[self.source[self.known]].to(here)
        rows[self.n_here :] = there[self.n_there :].to(here)
        return rows

    def counts(self, name: str) -> str:
        """How many are known, gone and new, without padding."""
        known = self.n_here - self.n_new
        gone = self.n_there - known
        return f"{known - 1:,} {name} carried over, {gone:,} gone, {self.n_new:,} new"


def asks_for_start(config: Config) -> bool:
    """Whether ``init_from`` names a run to be read; where a checkpoint gave it, it does not."""
    return config["init_from"] is not None and not config.is_stored("init_from")


def start_checksum(config: Config) -> dict[str, str]:
    """What the start adds to the name of a result: a checksum of weights and items, or nothing.

    Raises:
        UserError: if the run that ``init_from`` names cannot be used.
    """
    if not asks_for_start(config):
        return {}
    tensors, content = load_run(checkpoint.resolve(config["init_from"], BEST))
    items = torch.tensor([*"\n".join(content["items"]).encode()], dtype=torch.uint8)
    return {"init_from": files.digest(checkpoint.subset(tensors, "model") | {"data.items": items})}


def warm_start(config: Config, dataset: FlatDataset, train: FlatDataset, model: Any) -> list[str]:
    """Put the weights of the run that ``init_from`` names, if any, into a new model.

    Nothing random is drawn.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): all interactions.
        train (FlatDataset): its training part, from which new items take their company.
        model (SequentialModel): on its device.

    Returns:
        list: lines for the log, which say how much was carried over.

    Raises:
        UserError: if the run cannot be used, or has another model or other sizes.
    """
    if not asks_for_start(config):
        return []
    path = checkpoint.resolve(config["init_from"], BEST)
    tensors, content = load_run(path)
    _check_model(path, content, config, model)
    there, here = checkpoint.subset(tensors, "model"), model.state_dict()
    items = _Ids.of(content["items"], dataset.item_ids)
    users = _Ids.of(content["users"], dataset.user_ids, content.get("n_users", 0))
    vectors = config["item_vectors_mode"] if config["item_vectors"] is not None else None
    rows_of = _rows_of(config, train, here)
    n_from_company, n_whole = 0, 0
    for name in (here.keys() | there.keys()) - model.run_tensors:
        if name not in here or name not in there:
            lacks = "lacks" if name in here else "has, unlike the new model,"
            raise _misfit(path, content, config, f"it {lacks} {name}")
        old, new, owner = there[name], here[name], rows_of.get(name)
        if owner == "items" and items.fit(old, new):
            if name == _TABLE and vectors == "frozen":
                continue
            here[name] = rows = items.carried(old, new)
            if name != _TABLE or vectors is None:
                n_from_company = _fill_from_company(rows, items, train)
        elif owner == "users" and users.fit(old, new):
            here[name] = users.carried(old, new)
        elif owner is None and old.shape == new.shape:
            here[name], n_whole = old, n_whole + 1
        else:
            why = f"{name} has shape {tuple(old.shape)} there, {tuple(new.shape)} here"
            if owner == _NEITHER:
                why = f"{name} depends on the number of items or users, but has no row for each"
            raise _misfit(path, content, config, why)
    model.load_state_dict(here)
    carried = _carried(items, n_from_company, vectors)
    carried += f"; {users.counts('users')} (fresh)" if "users" in rows_of.values() else ""
    source = f"init_from: {content['config']['model']} in {path}"
    return [
        f"{source}: {carried}; {n_whole:,} other tensors carried over",
        *_leak(path, content, config),
    ]


def _carried(items: _Ids, n_from_company: int, vectors: str | None) -> str:
    """How many items were carried over, and where new ones come from."""
    if vectors == "frozen":
        return "the item table is item_vectors, mode frozen"
    new = f"{n_from_company:,} from the items they occur with"
    new += f", {items.n_new - n_from_company:,} fresh"
    if vectors is not None:
        new = f"from item_vectors, mode {vectors}"
    return f"{items.counts('items')} ({new})"


def _rows_of(config: Config, train: FlatDataset, here: Mapping[str, Tensor]) -> dict[str, str]:
    """Which tensors have a row for each of what: name -> items, users or neither.

    The same model is built for data with more items and users. A position table with as many rows
    as there are items does not grow with them.
    """
    larger, tokens = copy.copy(train), dict(train.field2id_token)
    for owner, field in (("items", train.iid_field), ("users", train.uid_field)):
        tokens[field] = np.append(tokens[field], [f"another {i}" for i in range(_MORE[owner])])
    larger.field2id_token = tokens
    with preserved_rng():
        grown = build_model(config, larger).state_dict()
    found = {}
    for name, tensor in here.items():
        shape = tuple(tensor.shape)
        if tuple(grown[name].shape) == shape:
            continue
        shapes = {owner: (shape[0] + more, *shape[1:]) for owner, more in _MORE.items()}
        owners = (owner for owner in shapes if tuple(grown[name].shape) == shapes[owner])
        found[name] = next(owners, _NEITHER)
    return found


def _fill_from_company(rows: Tensor, items: _Ids, train: FlatDataset) -> int:
    """Replace rows of new items by the mean of the known items that their users have.

    A known item counts as often as it occurs beside the new one.

    Args:
        rows (Tensor): of padding and all items, and perhaps further ones, [n, ...]; overwritten.
        items (_Ids): of both runs.
        train (FlatDataset): the training part.

    Returns:
        int: rows replaced; those of items that occur with no known one in training are not.
    """
    if not train.list_fields or not rows.is_floating_point():  # ready-made prefixes
        return 0
    item, ends = train.training_items()
    user = torch.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)))
    known = items.known[item]
    flat = rows.detach().cpu().reshape(len(rows), -1).double()
    of_user = flat.new_zeros(len(ends), flat.shape[1])
    of_user.index_add_(0, user[known], flat[item[known]])
    n_of_user = torch.bincount(user[known], minlength=len(ends)).double()
    of_item = torch.zeros_like(flat).index_add_(0, item[~known], of_user[user[~known]])
    n_of_item = flat.new_zeros(len(rows)).index_add_(0, item[~known], n_of_user[user[~known]])
    (new,) = (n_of_item > 0).nonzero(as_tuple=True)
    means = of_item[new] / n_of_item[new].unsqueeze(1)
    rows[new.to(rows.device)] = means.reshape(-1, *rows.shape[1:]).to(rows)
    return len(new)


def _check_model(path: Path, content: Mapping[str, Any], config: Config, model: Any) -> None:
    """Refuse another model, and one that has nothing to start from."""
    theirs = content["config"]["model"]
    if theirs in WRAPPERS:  # its backbone is what was trained
        theirs = str(content["config"]["values"].get("backbone"))
    if theirs != config.name:
        raise UserError(
            f"init_from={path} is a run of model={theirs}, not of {config.name}; give a run of the "
            "same model",
            keys=("init_from", "model"),
        )
    if any(phase.fit for phase in model.training_plan()):
        raise UserError(
            f"init_from={path}: model={config.name} is computed from the data at once, so there "
            "is nothing to start from; leave init_from out",
            keys=("init_from", "model"),
        )


def _misfit(path: Path, content: Mapping[str, Any], config: Config, what: str) -> UserError:
    """The error for other sizes, with the settings of the model that differ."""
    theirs = content["config"]["values"]
    names = [k for k in theirs if k in config and (k not in KEYS or k == "MAX_ITEM_LIST_LENGTH")]
    differing = [f"{k}={config[k]}, there {theirs[k]}" for k in names if config[k] != theirs[k]]
    settings = f" Settings that differ: {'; '.join(differing)}" if differing else ""
    return UserError(
        f"init_from={path} does not fit the model: {what}. Sizes must be those of the run."
        + settings,
        keys=("init_from",),
    )


def _leak(path: Path, content: Mapping[str, Any], config: Config) -> list[str]:
    """A note where the run may have been trained on what is held out here."""
    theirs = content["config"]["values"].get("eval_args") or {}
    same = all(theirs.get(key) == config["eval_args"][key] for key in ("split", "group_by"))
    if same or not config.held_out:
        return []
    return [
        f"init_from: {path} was trained with eval_args={theirs}, so it may have seen what is held "
        "out here, and scores may be too high"
    ]
