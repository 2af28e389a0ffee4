"""Time embeddings against diffusers, and what the Transformer denoiser hands on."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from recbole_simdiff.diffusion.denoisers import (
    TIME_EMBEDDINGS,
    DenoiserInput,
    TimestepEmbedding,
    timestep_embedding,
)

# Two rows, of lengths 3 and 1.
LAYOUT = SimpleNamespace(row=torch.tensor([0, 0, 0, 1]), position=torch.tensor([0, 1, 2, 0]))


def make(time_embedding: str = "sinusoidal", dropout_prob: float = 0.0) -> DenoiserInput:
    torch.manual_seed(0)
    return DenoiserInput(8, 4, 10, dropout_prob, 1e-12, time_embedding)


def identity(
    hidden: torch.Tensor, layout: object, causal: bool, tokens: torch.Tensor | None
) -> torch.Tensor:
    assert layout is LAYOUT
    assert causal is False
    return hidden if tokens is None else hidden[tokens]


@pytest.mark.parametrize("endpoint", [False, True])
@pytest.mark.parametrize("width", [4, 8, 64])
def test_sinusoid_equals_diffusers(endpoint, width):
    t = torch.tensor([0, 1, 7, 999])
    theirs = get_timestep_embedding(
        t, width, flip_sin_to_cos=False, downscale_freq_shift=float(endpoint)
    )
    torch.testing.assert_close(timestep_embedding(t, width, endpoint), theirs, atol=1e-4, rtol=0)


def test_frequencies_fall_to_their_end():
    """Small angles are their own sine, so the first half shows the frequencies themselves."""
    small = torch.tensor([1e-3])
    for endpoint, last in ((True, 1e-4), (False, 1e-3)):
        features = timestep_embedding(small, 8, endpoint)[0, :4] / 1e-3
        steps = (features[1:] / features[:-1]).log()
        assert features[0].item() == pytest.approx(1.0, rel=1e-5)
        assert features[-1].item() == pytest.approx(last, rel=1e-5)
        torch.testing.assert_close(steps, steps[:1].expand(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("endpoint", [False, True])
def test_odd_and_tiny_widths(width, endpoint):
    out = timestep_embedding(torch.tensor([0, 3]), width, endpoint)
    assert out.shape == (2, width)
    assert torch.isfinite(out).all()
    assert out[1, 0].item() == pytest.approx(math.sin(3.0))


def test_sinusoidal_time_is_two_layers_over_the_sinusoid():
    torch.manual_seed(0)
    module, t = TimestepEmbedding(8), torch.tensor([1, 9])
    first, _, second = module.mlp
    inner = first(timestep_embedding(t, 8))
    assert inner.shape == (2, 32)
    torch.testing.assert_close(module(t), second(inner * inner.sigmoid()))


@pytest.mark.parametrize("time_embedding", TIME_EMBEDDINGS)
def test_input_is_embedding_plus_time_plus_position_normalised(time_embedding):
    """Each token gets its row's step and its own place."""
    model, t = make(time_embedding), torch.tensor([3, 10])
    z_t = torch.randn(4, 8)
    sums = []
    for token, (row, position) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)]):
        time = model.time_embedding(t[row : row + 1])[0]
        sums.append(z_t[token] + time + model.position_embedding.weight[position])
    expected = nn.functional.layer_norm(torch.stack(sums), (8,), eps=1e-12)
    torch.testing.assert_close(model(z_t, t, LAYOUT, identity), expected)
    some = torch.tensor([3, 1])
    torch.testing.assert_close(model(z_t, t, LAYOUT, identity, some), expected[some])


def test_without_positions_equal_tokens_stay_equal():
    t = torch.tensor([3, 10])
    z_t = torch.randn(1, 8).expand(4, 8)
    torch.manual_seed(0)
    model = DenoiserInput(8, 4, 10, 0.0, 1e-12, "sinusoidal", absolute_positions=False)
    out = model(z_t, t, LAYOUT, identity)
    assert torch.equal(out[0], out[2])
    assert not torch.equal(out[0], out[3])  # another step


@pytest.mark.parametrize("time_embedding", TIME_EMBEDDINGS)
def test_every_legal_step_has_its_own_embedding(time_embedding):
    out = make(time_embedding).time_embedding(torch.arange(1, 11))
    assert out.shape == (10, 8)
    assert len({tuple(row) for row in out.tolist()}) == 10


def test_dropout_acts_in_training_only():
    model, t, z_t = make(dropout_prob=0.5), torch.tensor([3, 10]), torch.randn(4, 8)
    dropped = model(z_t, t, LAYOUT, identity)
    assert (dropped == 0).any()
    model.eval()
    assert torch.equal(model(z_t, t, LAYOUT, identity), model(z_t, t, LAYOUT, identity))
    assert (model(z_t, t, LAYOUT, identity) != 0).all()


def test_the_transformer_is_the_callers():
    """It is an argument, so that it may be shared; the module holds no parameters of it."""
    model, t, z_t = make(), torch.tensor([3, 10]), torch.randn(4, 8)
    doubled = model(z_t, t, LAYOUT, lambda *args, **kwargs: 2 * identity(*args, **kwargs))
    torch.testing.assert_close(doubled, 2 * model(z_t, t, LAYOUT, identity))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"position_embedding", "time_embedding", "LayerNorm"}
