"""A user's vectors of items, such as text embeddings, in the item table of a model.

    init     the table starts as the vectors and is trained
    frozen   the table is the vectors and stays as it is; extra tokens, such as a mask, are trained
    added    the vectors are added to the random start of the table, which is trained

A table W + V with fixed vectors V gets the gradients of a table that starts at W + V, so ``added``
needs no parameters of its own. In all modes a checkpoint holds the resulting table alone, and the
file is not needed again. Vectors are taken as they are: neither scaled nor projected.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recbole_simdiff.data.atomic_files import AtomicFile, obstacle
from recbole_simdiff.data.dataset import FlatDataset
from recbole_simdiff.data.manifest import sha256
from recbole_simdiff.data.parquet import open_parquet, parquet_rows
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger

_KEYS = ("item_vectors", "item_vectors_mode")

SUFFIXES = (".npz", ".parquet")


def apply_item_vectors(config: Any, dataset: FlatDataset, model: Any) -> None:
    """Put the vectors of ``item_vectors`` into the item table of a new model, if there are any.

    It must be on its device already. A configuration from a checkpoint reads no file: the table is
    in the checkpoint.

    Args:
        config (Config): resolved configuration.
        dataset (FlatDataset): the data set, whose items need a vector each.
        model (SequentialModel): it has a module ``item_embedding`` with a row for each item.

    Raises:
        UserError: if the file cannot be used, items lack a vector, their width is not the table's,
            or the model has no such table.
    """
    if config["item_vectors"] is None:
        return
    module = dict(model.named_children()).get("item_embedding")
    if model.item_table is None or not isinstance(module, nn.Embedding):
        raise UserError(
            f"item_vectors={config['item_vectors']!r}: model={config['model']} has no table of all "
            "items named item_embedding",
            keys=("item_vectors", "model"),
        )
    weight, mode = module.weight, config["item_vectors_mode"]
    if not config.is_stored("item_vectors"):
        vectors = read_item_vectors(config, dataset)
        _check_width(config, vectors, weight)
        with torch.no_grad():
            rows = weight[1 : dataset.item_num]
            rows.copy_(rows + vectors.to(rows) if mode == "added" else vectors)
        norms = vectors.norm(dim=1)
        logger.info(
            f"item vectors: {len(vectors):,} of width {vectors.shape[1]} from "
            f"{config['item_vectors']}, mode {mode}, mean norm {norms.mean():.3f}"
        )
    if mode == "frozen" and weight.requires_grad:
        _freeze(config, weight, dataset.item_num)


def vectors_checksum(config: Any) -> dict[str, str]:
    """What the vectors add to the name of a result: a checksum of their file, or nothing.

    Nothing, too, where the file is missing, which ``read_item_vectors`` reports, or where a
    checkpoint gave the setting, which holds the table.

    Args:
        config (Config): resolved configuration.
    """
    given = config["item_vectors"]
    if given is None or config.is_stored("item_vectors"):
        return {}
    path = Path(config["data_path"]) / f"{config['dataset']}.item"
    path = Path(given) if Path(given).suffix in SUFFIXES else path
    return {"item_vectors": sha256(path)} if path.is_file() else {}


def read_item_vectors(config: Any, dataset: FlatDataset) -> Tensor:
    """The vector of each item in the order of their numbers, [n_items - 1, width].

    ``item_vectors`` is a file or a column:

        FILE.npz       arrays ``ids`` [n] and ``vectors`` [n, width]
        FILE.parquet   a column of ids, named as ITEM_ID_FIELD; the others are one list of numbers,
                       or a number each
        COLUMN         of float_seq, of the data set's ``.item`` file

    Raises:
        UserError: if it cannot be read, has no finite vector for some items, or two for one.
    """
    given = config["item_vectors"]
    suffix = Path(given).suffix
    if suffix in SUFFIXES:
        path = Path(given)
        if reason := obstacle(path):
            raise UserError(f"item_vectors={given!r} {reason}", keys=_KEYS[:1])
        read = _npz if suffix == ".npz" else _parquet
        ids, vectors = read(path, dataset.iid_field)
    else:
        ids, vectors = _column(given, dataset)
    if len({len(vector) for vector in vectors}) != 1:
        raise UserError(
            f"item_vectors={given!r}: vectors must all have one width; there are "
            f"{len(vectors):,} of widths {sorted({len(vector) for vector in vectors})[:5]}",
            keys=_KEYS[:1],
        )
    return _ordered(given, ids, np.asarray(vectors, np.float32), dataset.item_ids[1:])


def _npz(path: Path, _: str) -> tuple[list[str], Sequence[Any]]:
    """Ids and vectors of a NumPy archive; nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, vectors = arrays["ids"], arrays["vectors"]
            if ids.ndim != 1 or vectors.ndim != 2 or len(ids) != len(vectors):
                raise ValueError(f"their shapes are {ids.shape} and {vectors.shape}")
            return list(map(str, ids.tolist())), vectors.astype(np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"item_vectors: {path} must hold the arrays ids [n], text or whole numbers, and "
            f"vectors [n, width], numbers: {error}",
            keys=_KEYS[:1],
        ) from error


def _parquet(path: Path, id_field: str) -> tuple[list[str], Sequence[Any]]:
    """Ids and vectors of a Parquet file."""
    file = open_parquet(path)
    names = list(file.schema_arrow.names)
    if id_field not in names or len(names) < 2:
        raise UserError(
            f"item_vectors: {path} must have a column {id_field} of ids and one or more of "
            f"numbers; it has {', '.join(names)}",
            keys=_KEYS[:1],
        )
    names.remove(id_field)
    rows = list(parquet_rows(path, file, [id_field, *names]))
    cells = [row[1] if len(names) == 1 and isinstance(row[1], list) else row[1:] for row in rows]
    try:
        vectors = [np.asarray(cell, np.float32).reshape(-1) for cell in cells]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"item_vectors: {path} has a cell that is no number: {error}", keys=_KEYS[:1]
        ) from error
    return [str(row[0]) for row in rows], vectors


def _column(field: str, dataset: FlatDataset) -> tuple[list[str], Sequence[Any]]:
    """Ids and vectors of the data set's ``.item`` file."""
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if reason := obstacle(path):
        raise UserError(
            f"item_vectors={field!r} is neither a .npz nor a .parquet file, and {path}, of which "
            f"it would be a column, {reason}",
            keys=_KEYS[:1],
        )
    file = AtomicFile.of(str(path), dataset.config)
    columns = [f"{dataset.iid_field}:token", f"{field}:float_seq"]
    if not set(columns) <= {*file.headers}:
        raise UserError(
            f"item_vectors={field!r} needs the columns {' and '.join(columns)} in {path}; it has "
            f"{', '.join(file.headers)}",
            keys=_KEYS[:1],
        )
    frame = file.read(dict.fromkeys(columns, str)).fillna("")
    try:
        vectors = [
            np.array([*map(float, filter(None, cell.split(file.seq_separator)))], np.float32)
            for cell in frame[columns[1]]
        ]
    except ValueError:
        file.refuse_number([columns[1]])
        raise
    return frame[columns[0]].tolist(), vectors


def _ordered(given: str, ids: Sequence[str], vectors: Any, items: Sequence[str]) -> Tensor:
    """Rows of some items, in their order; other rows are passed over."""
    places = {item: number for number, item in enumerate(ids)}
    if len(places) < len(ids):
        raise UserError(
            f"item_vectors={given!r}: {len(ids) - len(places):,} ids have more than one vector",
            keys=_KEYS[:1],
        )
    missing = [item for item in items if item not in places]
    if missing:
        shown = ", ".join(missing[:3])
        raise UserError(
            f"item_vectors={given!r}: {len(missing):,} of {len(items):,} items have no vector, "
            f"such as {shown}; ids there are such as {', '.join(ids[:3])}",
            keys=_KEYS[:1],
        )
    chosen = torch.from_numpy(np.ascontiguousarray(vectors[[places[item] for item in items]]))
    wrong = (~chosen.isfinite()).any(1)
    if wrong.any():
        raise UserError(
            f"item_vectors={given!r}: {int(wrong.sum()):,} vectors are not finite, the first that "
            f"of {items[int(wrong.int().argmax())]}",
            keys=_KEYS[:1],
        )
    return chosen


def _check_width(config: Any, vectors: Tensor, weight: Tensor) -> None:
    if vectors.shape[1] != weight.shape[1]:
        size = "hidden_size" if "hidden_size" in config else "embedding_size"
        raise UserError(
            f"item_vectors={config['item_vectors']!r} have width {vectors.shape[1]}, the item "
            f"table has {weight.shape[1]}. Set {size}={vectors.shape[1]}, or reduce the vectors, "
            "for example by their principal components",
            keys=(_KEYS[0], size),
        )


def _freeze(config: Any, weight: Tensor, n_items: int) -> None:
    """Rows of padding and items get no gradient; an optimiser with weight decay would move them."""
    if config["weight_decay"]:
        raise UserError(
            f"item_vectors_mode=frozen needs weight_decay=0, which is {config['weight_decay']}",
            keys=(_KEYS[1], "weight_decay"),
        )
    frozen = torch.arange(len(weight), device=weight.device) < n_items
    weight.register_hook(lambda gradient: gradient.masked_fill(frozen.unsqueeze(1), 0))
