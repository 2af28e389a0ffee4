"""Sampled negatives: their distribution, and what the papers say of the losses over them."""

import math

import pytest
import torch
from torch.nn import functional as F

from recbole_simdiff.modules.negatives import (
    DISTRIBUTIONS,
    NegativeSampler,
    gbce_beta,
    gbce_loss,
    negative_logits,
    sampled_softmax_loss,
)

CPU = torch.device("cpu")
N = 8  # ids, padding included
COUNTS = torch.tensor([0, 5, 1, 9, 0, 2, 2, 7])
BY_POPULARITY = [3, 7, 1, 5, 6, 2, 4]  # ties by id


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_follow_their_probabilities(distribution: str) -> None:
    torch.manual_seed(0)
    sampler = NegativeSampler(distribution, COUNTS, N)
    n = 200_000
    share = torch.bincount(sampler.draw(n, device=CPU), minlength=N) / n
    probability = sampler.log_probability(torch.arange(1, N)).exp()
    assert share[0] == 0
    assert probability.sum().item() == pytest.approx(1)
    torch.testing.assert_close(share[1:], probability, atol=0.005, rtol=0)


def test_the_popular_are_drawn_more() -> None:
    sampler = NegativeSampler("log_uniform", COUNTS, N)
    probability = sampler.log_probability(torch.tensor(BY_POPULARITY)).exp().tolist()
    assert probability == sorted(probability, reverse=True)
    first, second = math.log(2) / math.log(N), math.log(3 / 2) / math.log(N)
    assert probability[:2] == pytest.approx([first, second])


@pytest.fixture
def case() -> tuple[torch.Tensor, ...]:
    """Queries [n, H], table [N, H], targets [n], negatives of each token [n, K]."""
    torch.manual_seed(1)
    hidden, table = torch.randn(5, 4).double(), torch.randn(N, 4).double()
    return hidden, table, torch.randint(1, N, (5,)), torch.randint(1, N, (5, 6))


@pytest.mark.parametrize("memory_mb", [1e-6, 16.0])
def test_logits_and_gradients_are_those_of_a_look_up(
    case: tuple[torch.Tensor, ...], memory_mb: float
) -> None:
    hidden, table, target, negative = case

    def total(h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return negative_logits(h, e, target, negative, memory_mb).exp().sum()

    expected = torch.einsum("nh,nkh->nk", hidden, table[negative])
    expected[negative == target[:, None]] = -torch.inf
    logits = negative_logits(hidden, table, target, negative, memory_mb)
    torch.testing.assert_close(logits, expected.float())
    shared = negative_logits(hidden, table, target, negative[0], memory_mb)
    each = negative_logits(hidden, table, target, negative[:1].expand(5, -1), memory_mb)
    torch.testing.assert_close(shared, each)
    h, e = hidden.requires_grad_(), table.requires_grad_()
    got = torch.autograd.grad(total(h, e), (h, e))
    dense = (h @ e.t()).gather(1, negative).masked_fill(negative == target[:, None], -torch.inf)
    for one, other in zip(got, torch.autograd.grad(dense.exp().sum(), (h, e)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_corrected_sum_is_that_of_all_other_items(
    case: tuple[torch.Tensor, ...], distribution: str
) -> None:
    """Unbiased: the mean of sum_k e^(s_k - log(K q_k)) over many draws is the sum over items."""
    hidden, table, target, _ = case
    sampler, n = NegativeSampler(distribution, COUNTS, N), 100_000
    negative = sampler.draw(n, device=CPU)
    logits = negative_logits(hidden, table, target, negative, 16.0)
    offset = sampler.log_probability(negative) + math.log(n)
    scores = hidden @ table[1:].t()
    right = scores.gather(1, target[:, None] - 1).squeeze(1)
    everything = F.cross_entropy(scores, target - 1, reduction="sum")
    sampled = sampled_softmax_loss(right, logits, offset)
    assert sampled.item() == pytest.approx(everything.item(), rel=0.01)


def test_without_a_correction_it_is_the_softmax_of_those_drawn(
    case: tuple[torch.Tensor, ...],
) -> None:
    hidden, table, target, negative = case
    logits = negative_logits(hidden, table, target, negative, 16.0)
    right = (hidden * table[target]).sum(1)
    both = torch.cat([right[:, None].float(), logits], 1)
    expected = F.cross_entropy(both, torch.zeros(5).long(), reduction="sum")
    assert sampled_softmax_loss(right, logits, 0.0).item() == pytest.approx(expected.item())


def test_gbce_without_calibration_is_bce(case: tuple[torch.Tensor, ...]) -> None:
    """gSASRec: t = 0."""
    hidden, table, target, negative = case
    assert gbce_beta(6, N, 0.0) == pytest.approx(1)
    logits = negative_logits(hidden, table, target, negative, 16.0)
    right = (hidden * table[target]).sum(1).float()
    both = torch.cat([right[:, None], logits], 1)
    labels = torch.zeros_like(both)
    labels[:, 0] = 1
    each = F.binary_cross_entropy_with_logits(both, labels, reduction="none")
    expected = each.where(both > -torch.inf, 0).sum() / 7
    assert gbce_loss(right, logits, 1.0).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("n_negatives", [1, 3])
def test_fully_calibrated_gbce_gives_probabilities(n_negatives: int) -> None:
    """gSASRec: with t = 1 the sigmoid of the best score of an item is its probability."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.1])
    n_items = len(probability) + 1
    beta = gbce_beta(n_negatives, n_items, 1.0)
    assert beta == pytest.approx(n_negatives / (n_items - 2))
    scores = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=100)
    # Each of the other items is one of the K uniform negatives with probability K / (V - 1).
    rate = torch.full((4, 4), n_negatives / 3).fill_diagonal_(0)

    def expected_loss() -> torch.Tensor:
        optimizer.zero_grad()
        right, wrong = F.softplus(-scores), rate @ F.softplus(scores)
        loss = (probability * (beta * right + wrong)).sum()
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    torch.testing.assert_close(scores.detach().sigmoid(), probability, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("n_negatives", "t"), [(1, 0.0), (1, 1.0), (256, 0.75)])
def test_the_power_of_positives_is_the_papers(n_negatives: int, t: float) -> None:
    """Eq. 10, and its two ends: 1 for t = 0, the sampling rate for t = 1."""
    rate = n_negatives / (12_102 - 2)
    assert gbce_beta(n_negatives, 12_102, t) == pytest.approx(1 + t * (rate - 1))
