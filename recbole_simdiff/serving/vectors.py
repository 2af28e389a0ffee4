"""Vectors whose products are a model's scores, and their files."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_atomically
from recbole_simdiff.models.dreamrec import DreamRec
from recbole_simdiff.models.recbole import RecBoleModel
from recbole_simdiff.modules.encoder import EncoderRecommender

FORMATS = ("csv", "npz", "parquet")

# RecBole's models whose score is forward(item_seq, item_seq_len) times a row of item_embedding.
BY_PRODUCT = ("GCSAN", "GRU4Rec", "LightSANs", "NARM", "SASRec", "SRGNN", "STAMP")


class Vectors(NamedTuple):
    """Vectors with their ids.

    Attributes:
        ids (list): raw ids, one a row.
        values (ndarray): float32, [n, H].
    """

    ids: list[str]
    values: NDArray[np.float32]


def item_matrix(name: str, model: Any) -> Tensor:
    """Vectors of padding and all items, [n_items, H], on the CPU.

    Args:
        name (str): what the user calls the model.
        model (SequentialModel): the model.

    Raises:
        UserError: if it has no table of items.
    """
    table = model.item_table
    if table is None:
        raise UserError(f"model={name} has no table of item embeddings")
    if isinstance(model, DreamRec):
        _, table, offset = model.ranking(table[:1])
        table = torch.cat([table, offset.unsqueeze(1)], 1) if offset.any() else table
    found: Tensor = table.detach().float().cpu()
    return found


def user_matrix(name: str, model: Any, batch: Interaction) -> Tensor:
    """Vectors of histories, [B, H], on the CPU.

    Args:
        name (str): what the user calls the model.
        model (SequentialModel): the model.
        batch (Interaction): histories.

    Raises:
        UserError: if the model has none.
    """
    if isinstance(model, DreamRec):
        vectors, _, offset = model.ranking(model.generate(batch))
        if offset.any():
            vectors = torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1)
    elif has_forward_vectors(model):
        vectors = model(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN])
    else:
        raise UserError(
            f"model={name} has no vectors of users whose products with items' are its scores; "
            f"models of this package have, and of RecBole {', '.join(BY_PRODUCT)}"
        )
    found: Tensor = vectors.float().cpu()
    return found


def has_forward_vectors(model: Any) -> bool:
    """Whether ``model(item_seq, item_seq_len)`` times the item table is the model's scores."""
    if isinstance(model, DreamRec):
        return False
    known = isinstance(model, RecBoleModel) and type(model).__name__ in BY_PRODUCT
    return known or isinstance(model, EncoderRecommender)


def write_vectors(vectors: Vectors, path: Path) -> None:
    """Write vectors as a file of the format that its name ends in; see ``FORMATS``.

    ``csv`` has the columns id, 0, 1, ...; ``npz`` the arrays ids and vectors, readable without
    pickles; ``parquet`` the columns id and vector, a list of floats.

    Raises:
        UserError: if the library for Parquet is missing.
    """
    writers = {"csv": _write_csv, "npz": _write_npz, "parquet": _write_parquet}
    write = writers[path.suffix.removeprefix(".")]
    write_atomically(path, lambda name: write(vectors, name))


def _write_csv(vectors: Vectors, name: str) -> None:
    frame = pd.DataFrame(vectors.values)
    frame.insert(0, "id", vectors.ids)
    frame.to_csv(name, index=False)


def _write_npz(vectors: Vectors, name: str) -> None:
    np.savez(name, ids=np.array(vectors.ids, dtype=np.str_), vectors=vectors.values)


def _write_parquet(vectors: Vectors, name: str) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "--format=parquet needs pyarrow: pip install 'recbole_simdiff[export]'"
        ) from None
    flat = pyarrow.array(vectors.values.reshape(-1))
    rows = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.values.shape[1])
    parquet.write_table(pyarrow.table({"id": vectors.ids, "vector": rows}), name)
