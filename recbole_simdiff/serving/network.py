"""The scoring network as a file that runs without this package: ONNX, or a program of torch."""

import json
from pathlib import Path
from typing import Any

import torch
from recbole.model.layers import TransformerEncoder
from torch import Tensor, nn

from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_atomically
from recbole_simdiff.modules.encoder import EncoderRecommender
from recbole_simdiff.modules.transformer import PackedTransformer
from recbole_simdiff.serving.recommender import Recommender
from recbole_simdiff.serving.vectors import has_forward_vectors, item_matrix

NETWORKS = ("onnx", "pt2")

IDS = "items.json"

# Largest difference to the scores of ``recommend`` that an exported network may have.
TOLERANCE = 1e-4

_MASKED = -10000.0  # what RecBole's dense attention adds for a cell that is not attended to


class DenseEncoder(nn.Module):
    """The encoder of an ``EncoderRecommender`` on padded rows, without packing.

    Packing takes sizes from the data, which an exported program cannot. The weights are shared.

    Args:
        model (EncoderRecommender): with a ``PackedTransformer`` of no further parts.

    Raises:
        UserError: if its Transformer is another one.
    """

    def __init__(self, model: EncoderRecommender) -> None:
        super().__init__()
        if type(model.trm_encoder) is not PackedTransformer:
            raise UserError("only encoders of RecBole's plain Transformer layers are exported")
        self.item_embedding = model.item_embedding
        self.position_embedding = model.position_embedding
        self.norm, self.transformer = model.LayerNorm, model.trm_encoder

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """State of each sequence, [B, L], [B] -> [B, H]."""
        place = torch.arange(item_seq.shape[1], device=item_seq.device)
        hidden = self.norm(self.item_embedding(item_seq) + self.position_embedding(place))
        seen = (place <= place.unsqueeze(1)) & (place < item_seq_len.view(-1, 1, 1))  # [B, L, L]
        mask = torch.where(seen, 0.0, _MASKED).unsqueeze(1)
        (hidden,) = TransformerEncoder.forward(self.transformer, hidden, mask, False)
        newest = (item_seq_len - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        return hidden.gather(1, newest).squeeze(1)


class ScoringNetwork(nn.Module):
    """Histories to scores of all items: what is exported.

    Args:
        name (str): what the user calls the model.
        model (SequentialModel): whose score is a product of a state and the table of items.

    Raises:
        UserError: if it is another one.
    """

    table: Tensor

    def __init__(self, name: str, model: Any) -> None:
        super().__init__()
        if not has_forward_vectors(model):
            raise UserError(
                f"model={name} cannot be exported as a network: only models that encode a history "
                "and score it against the table of items can"
            )
        self.encoder = DenseEncoder(model) if isinstance(model, EncoderRecommender) else model
        self.register_buffer("table", item_matrix(name, model))

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Scores of padding and all items, [B, L], [B] -> [B, n_items].

        Args:
            item_seq (LongTensor): numbers of items, oldest first, right-padded with 0, [B, L], L at
                most the model's MAX_ITEM_LIST_LENGTH.
            item_seq_len (LongTensor): how many of each row are no padding, at least 1, [B].
        """
        scores: Tensor = self.encoder(item_seq, item_seq_len) @ self.table.t()
        return scores


def export_network(recommender: Recommender, folder: Path, kind: str) -> list[Path]:
    """Write ``model.<kind>`` and ``items.json``, the raw ids of the scores' columns.

    The inputs are ``item_seq`` [B, L] and ``item_seq_len`` [B], int64, of any B and any L up to the
    ``max_length`` that ``items.json`` names; the output is ``scores`` [B, n_items]. Column 0 is
    padding.

    Args:
        recommender (Recommender): of the run.
        folder (Path): where to write.
        kind (str): one of ``NETWORKS``.

    Raises:
        UserError: if the model cannot be exported, or a library is missing.
    """
    config = recommender.config
    if config["device"].type != "cpu":
        raise UserError("a network is exported from the CPU: load(..., use_gpu=False)")
    length, n_items = config["MAX_ITEM_LIST_LENGTH"], len(recommender.item_ids)
    network = ScoringNetwork(config.name, recommender.model).eval()
    example = _example(length, n_items)
    _check(network, recommender, example)
    try:
        program = _program(network, example, length)
    except RuntimeError as error:  # torch's errors of export are such
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model={config.name} cannot be exported with any batch and length: {reason}"
        ) from error
    path, ids = folder / f"model.{kind}", folder / IDS
    content = {"items": recommender.item_ids, "max_length": length}
    write = _write_onnx if kind == "onnx" else torch.export.save
    write_atomically(path, lambda name: write(program, name))
    write_atomically(ids, lambda name: Path(name).write_text(json.dumps(content)))
    return [path, ids]


def _example(length: int, n_items: int) -> tuple[Tensor, Tensor]:
    """Histories of several lengths; one item is left where a model has no more."""
    lengths = torch.tensor([length, max(1, length // 2), 1])
    place = torch.arange(length)
    numbers = 1 + (place + torch.tensor([[0], [3], [5]])) % (n_items - 1)
    return numbers * (place < lengths.unsqueeze(1)), lengths


def _check(
    network: ScoringNetwork, recommender: Recommender, example: tuple[Tensor, Tensor]
) -> None:
    """Refuse a network whose scores are not the model's.

    Raises:
        UserError: if they are not.
    """
    seq, lengths = example
    ids = recommender.item_ids
    histories = [
        [ids[i] for i in row[:n]] for row, n in zip(seq.tolist(), lengths.tolist(), strict=True)
    ]
    answers = recommender.recommend(histories, k=len(ids), exclude_seen=False)
    with torch.no_grad():
        scores = network(seq, lengths)
    for row, answer in zip(scores, answers, strict=True):
        own = torch.tensor(answer.scores)
        error = float((row[recommender.numbers(answer.items)] - own).abs().max())
        if not error <= TOLERANCE * max(1.0, float(own.abs().max())):
            raise UserError(
                f"model={recommender.config.name} cannot be exported: its scores differ from those "
                f"of the network by up to {error:.3g}"
            )


def _program(network: ScoringNetwork, example: tuple[Tensor, Tensor], length: int) -> Any:
    """The network as a program of torch, of any batch and any length up to the model's."""
    batch = torch.export.Dim("batch")
    shapes: dict[str, Any] = {"item_seq": {0: batch}, "item_seq_len": {0: batch}}
    if length > 1:
        shapes["item_seq"][1] = torch.export.Dim("length", min=1, max=length)
    return torch.export.export(network, example, dynamic_shapes=shapes)


def _write_onnx(program: Any, name: str) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--format=onnx needs {error.name}: pip install 'recbole_simdiff[export]'"
        ) from None
    torch.onnx.export(
        program,
        (),
        name,
        input_names=["item_seq", "item_seq_len"],
        output_names=["scores"],
        external_data=False,
        verbose=False,
    )
