"""The weights of a former run as the start of a new one on other users and items (``init_from``).

A tensor with a row for each item or each user is told by its number of rows, there and here; if
both numbers are the same, it must also be an embedding, or belong to no submodule. Its rows are
carried over by raw id. All other tensors are carried over whole. A new item starts as the
mean of the known items that its users have in their training parts; or, with ``item_vectors``, as
its vector. Rows for which there is neither stay as they were drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recbole_simdiff import checkpoint, files
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import KEYS
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import WRAPPERS
from recbole_simdiff.runs.stored import load_run

_TABLE = "item_embedding.weight"  # where ``item_vectors`` go
_MAX_EXTRA = 2  # rows of a table after those of the items, such as a mask


class _Ids(NamedTuple):
    """Raw ids of a run and of the new data.

    Attributes:
        n_there, n_here (int): how many, padding included.
        max_extra (int): rows that a table may have after those of the ids.
        source (LongTensor): number there of each id here, -1 for a new one, [n_here].
    """

    n_there: int
    n_here: int
    max_extra: int
    source: Tensor

    @staticmethod
    def of(there: Sequence[str], here: Sequence[str], max_extra: int, n_there: int = 0) -> "_Ids":
        number = {raw: i for i, raw in enumerate(there)}
        source = torch.tensor([number.get(raw, -1) for raw in here])
        return _Ids(n_there or len(there), len(here), max_extra, source)

    @property
    def known(self) -> Tensor:
        """Whether each id was there, [n_here]."""
        return self.source >= 0

    @property
    def n_new(self) -> int:
        """How many were not there."""
        return int((~self.known).sum())

    def has_rows_in(self, there: Tensor, here: Tensor) -> bool:
        """Whether two tensors of one name have a row for each id, and equal further ones."""
        if there.dim() == 0 or there.shape[1:] != here.shape[1:]:
            return False
        extra = len(here) - self.n_here
        return 0 <= extra <= self.max_extra and len(there) - self.n_there == extra

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
    items = _Ids.of(content["items"], dataset.item_ids, _MAX_EXTRA)
    users = _Ids.of(content["users"], dataset.user_ids, 0, content.get("n_users", 0))
    vectors = config["item_vectors_mode"] if config["item_vectors"] is not None else None
    tables, n_from_company, n_whole, has_users = _tables(model), 0, 0, False
    for name in here.keys() | there.keys():
        if name not in here or name not in there:
            lacks = "lacks" if name in here else "has, unlike the new model,"
            raise _misfit(path, content, config, f"it {lacks} {name}")
        old, new = there[name], here[name]
        may_be_table = old.shape != new.shape or name in tables
        if may_be_table and items.has_rows_in(old, new):
            if name == _TABLE and vectors == "frozen":
                continue
            here[name] = rows = items.carried(old, new)
            if name != _TABLE or vectors is None:
                n_from_company = _fill_from_company(rows, items, train)
        elif may_be_table and users.has_rows_in(old, new):
            here[name], has_users = users.carried(old, new), True
        elif old.shape == new.shape:
            here[name], n_whole = old, n_whole + 1
        else:
            shapes = f"{name} has shape {tuple(old.shape)} there, {tuple(new.shape)} here"
            raise _misfit(path, content, config, shapes)
    model.load_state_dict(here)
    new = f"{n_from_company:,} from the items they occur with"
    new += f", {items.n_new - n_from_company:,} fresh"
    if vectors is not None:
        new = f"from item_vectors, mode {vectors}"
    carried = f"{items.counts('items')} ({new})"
    if vectors == "frozen":
        carried = "the item table is item_vectors, mode frozen"
    carried += f"; {users.counts('users')} (fresh)" if has_users else ""
    source = f"init_from: {content['config']['model']} in {path}"
    return [
        f"{source}: {carried}; {n_whole:,} other tensors carried over",
        *_leak(path, content, config),
    ]


def _tables(model: nn.Module) -> set[str]:
    """Names of the tensors that are embeddings, or belong to the model itself."""
    embeddings = (k for k, module in model.named_modules() if isinstance(module, nn.Embedding))
    own = (name for name, _ in model.named_parameters(recurse=False))
    return {*(f"{name}.weight" for name in embeddings), *own}


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
