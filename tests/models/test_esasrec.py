"""eSASRec: the layers and the loss of its paper."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from recbole_simdiff.modules.ligr import LiGRLayer
from recbole_simdiff.modules.transformer import TokenLayout


def plain_layer(layer: LiGRLayer, x: torch.Tensor) -> torch.Tensor:
    """The equations for one unpadded sequence, [L, H]."""
    normed, heads = layer.attention_norm(x), layer.attention.num_attention_heads
    q, k, v = (
        f(normed).unflatten(1, (heads, -1)).transpose(0, 1)
        for f in (layer.attention.query, layer.attention.key, layer.attention.value)
    )
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + layer.attention_gate(x).sigmoid() * layer.attention.dense(context)
    normed = layer.feed_norm(x)
    swiglu = layer.out(F.silu(layer.swish(normed)) * layer.linear(normed))
    return x + layer.feed_gate(x).sigmoid() * swiglu


@pytest.mark.parametrize("only", [False, True])
def test_packed_layers_are_the_papers(only: bool) -> None:
    torch.manual_seed(0)
    layer = LiGRLayer(2, 8, 12, 0.5, 0.5, 1e-5).eval()
    lengths = torch.tensor([3, 5, 1])
    layout = TokenLayout(lengths, 5)
    hidden = torch.randn(9, 8)
    out = layer(hidden, layout, causal=True, only=only)
    parts = [plain_layer(layer, part) for part in hidden.split(lengths.tolist())]
    expected = torch.stack([part[-1] for part in parts]) if only else torch.cat(parts)
    torch.testing.assert_close(out, expected)


def test_positions_are_counted_from_the_newest_item(build: Any) -> None:
    *_, model = build("ESASRec")
    model.eval()
    seen = []
    model.position_embedding.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model.forward(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]))
    assert seen[0].tolist() == [2, 1, 0, 0]


def test_a_later_item_does_not_change_an_earlier_state_but_by_its_age(build: Any) -> None:
    """Causal: with the positions taken out, the first states of a longer row are the same."""
    *_, model = build("ESASRec")
    model.eval()
    model.position_embedding.weight.data.zero_()
    seq = torch.tensor([[1, 2, 3]])
    long = model.encode(seq, TokenLayout(torch.tensor([3]), 3))
    short = model.encode(seq[:, :2], TokenLayout(torch.tensor([2]), 2))
    torch.testing.assert_close(long[:2], short)


def test_defaults_are_the_released_ones(make_config: Any) -> None:
    config = make_config("ESASRec")
    names = ("sr_loss", "n_negatives", "negatives_per", "negative_correction")
    assert [config[name] for name in names] == ["sampled_softmax", 256, "token", False]
    assert config["negative_distribution"] == "uniform"
