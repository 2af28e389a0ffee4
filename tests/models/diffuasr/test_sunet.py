"""The noise predictor: its sizes, its wiring written out once more, its pictures."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recbole_simdiff.models.diffuasr.sunet import SUNet, as_images, as_vectors

SHAPE = {"base": 8, "multipliers": [1, 2, 2, 2], "n_blocks": 2, "groups": 8, "attention_at": [16]}


def network(n_items: int = 10, width: int = 64, seed: int = 0, dropout: float = 0.0) -> SUNet:
    torch.manual_seed(seed)
    return SUNet(n_items=n_items, width=width, dropout_prob=dropout, **SHAPE)


def inputs(batch: int = 3, n_items: int = 10, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, n_items, width, generator=generator)
    c = torch.randn(batch, width, generator=generator)
    return x, torch.arange(1, batch + 1) * 300, c


def test_pictures_are_rows_of_the_vector():
    """T1: entry (b, m, i, j) is entry (b, m, i r + j), and back, bit for bit."""
    x = torch.randn(2, 3, 16)
    images = as_images(x)
    assert images.shape == (2, 3, 4, 4)
    for i in range(4):
        for j in range(4):
            assert torch.equal(images[:, :, i, j], x[:, :, 4 * i + j])
    assert torch.equal(as_vectors(images), x)


@pytest.mark.parametrize(
    ("n_items", "width", "count"),
    [(10, 64, 141_818), (5, 64, 141_093), (1, 64, 140_513), (10, 256, 149_482)],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(n_items, width, count, batch):
    """T3: the released parameter counts; any number of items in, as many out."""
    made = network(n_items, width)
    assert sum(p.numel() for p in made.parameters()) == count
    x, t, c = inputs(batch, n_items, width)
    assert made(x, t, c).shape == x.shape


def norm(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """Group normalisation with 8 groups, then swish."""
    grouped = h.reshape(len(h), 8, -1)
    mean, variance = grouped.mean(2, True), grouped.var(2, correction=0, keepdim=True)
    h = ((grouped - mean) / (variance + 1e-6).sqrt()).reshape(h.shape)
    return h * p[f"{name}.weight"].view(1, -1, 1, 1) + p[f"{name}.bias"].view(1, -1, 1, 1)


def swish(h: Tensor) -> Tensor:
    return h * torch.sigmoid(h)


def conv(h: Tensor, p: dict[str, Tensor], name: str, **options: int) -> Tensor:
    return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], **options)


def linear(h: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    return h @ p[f"{name}.weight"].t() + p[f"{name}.bias"]


def residual(x: Tensor, z: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    h = conv(swish(norm(x, p, f"{name}.norm_in")), p, f"{name}.conv_in", padding=1)
    h = h + linear(swish(z), p, f"{name}.project").view(len(h), -1, 1, 1)
    h = conv(swish(norm(h, p, f"{name}.norm_out")), p, f"{name}.conv_out", padding=1)
    return h + (conv(x, p, f"{name}.skip") if f"{name}.skip.weight" in p else x)


def attention(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    h = norm(x, p, f"{name}.norm")
    q, k, v = (conv(h, p, f"{name}.{part}").flatten(2) for part in ("query", "key", "value"))
    weight = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])
    mixed = torch.einsum("bij,bcj->bci", weight.softmax(2), v).reshape(x.shape)
    return x + conv(mixed, p, f"{name}.out")


def released(made: SUNet, x: Tensor, t: Tensor, c: Tensor, attends: bool) -> Tensor:
    """The layout of the specification, block by block, for 4 levels of 2 blocks."""
    p = dict(made.named_parameters())
    frequency = torch.tensor([math.exp(-k * math.log(10000) / 3) for k in range(4)])
    angle = (t - 1).view(-1, 1) * frequency
    tau = torch.cat([angle.sin(), angle.cos()], 1)
    z = linear(swish(linear(tau, p, "time.0")), p, "time.2")
    z = z + linear(swish(linear(c, p, "condition.0")), p, "condition.2")

    def block(h: Tensor, name: str, with_attention: bool) -> Tensor:
        h = residual(h, z, p, f"{name}.residual")
        return attention(h, p, f"{name}.attention") if with_attention else h

    size = math.isqrt(x.shape[2])
    h = conv(x.view(len(x), -1, size, size), p, "conv_in", padding=1)
    skips = [h]
    for level in range(4):
        for i in (0, 1):
            h = block(h, f"down.{2 * level + i}", attends and level == 0)
            skips.append(h)
        if level < 3:
            right = torch.zeros(*h.shape[:3], 1)
            h = torch.cat([h, right], 3)
            h = torch.cat([h, torch.zeros(*h.shape[:2], 1, h.shape[3])], 2)
            h = conv(h, p, f"shrink.{level}", stride=2)
            skips.append(h)
    assert len(skips) == 12
    h = block(block(h, "middle_in", True), "middle_out", False)
    for level in range(4):
        for i in range(3):
            h = torch.cat([h, skips.pop()], 1)
            h = block(h, f"up.{3 * level + i}", attends and level == 3)
        if level < 3:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = conv(h, p, f"grow.{level}", padding=1)
    h = conv(swish(norm(h, p, "norm_out")), p, "conv_out", padding=1)
    return h.reshape(x.shape)


@pytest.mark.parametrize("width", [64, 256])
def test_wiring(width):
    """T3: the layout written out; at width 256 the first level's pictures have attention."""
    made, (x, t, c) = network(width=width), inputs(width=width)
    with torch.no_grad():
        expected = released(made, x, t, c, attends=width == 256)
        torch.testing.assert_close(made(x, t, c), expected, rtol=1e-4, atol=1e-5)


def test_every_input_matters_and_rows_do_not_mix():
    """T34: an element alone gives what it gives in a batch."""
    made, (x, t, c) = network().eval(), inputs()
    with torch.no_grad():
        out = made(x, t, c)
        for other in (made(x + 1, t, c), made(x, t + 1, c), made(x, t, c + 1)):
            assert not torch.allclose(out, other)
        for row in range(3):
            one = slice(row, row + 1)
            torch.testing.assert_close(made(x[one], t[one], c[one]), out[one])


def test_every_parameter_is_used():
    """At a single pixel the attention's query and key have no effect, a part of the design."""
    made, (x, t, c) = network(), inputs()
    made(x, t, c).square().sum().backward()
    unused = {name for name, p in made.named_parameters() if not p.grad.abs().max() > 1e-9}
    assert unused == {
        f"middle_in.attention.{layer}.{part}"
        for layer in ("query", "key")
        for part in ("weight", "bias")
    }


def test_dropout_is_for_training_only():
    made, (x, t, c) = network(dropout=0.5), inputs()
    assert not torch.equal(made(x, t, c), made(x, t, c))
    made.eval()
    assert torch.equal(made(x, t, c), made(x, t, c))
