"""Whitening by its definition."""

import pytest
import torch

from recbole_simdiff.diffusion.whitening import whiten


def test_items_have_zero_mean_and_identity_covariance() -> None:
    """The padding row takes no part and is 0."""
    torch.manual_seed(0)
    table = torch.randn(200, 6) @ torch.randn(6, 6) * 0.05 + 3
    white = whiten(table)
    assert white.dtype == torch.float32
    assert (white[0] == 0).all()
    torch.testing.assert_close(white[1:].mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(white[1:].t() @ white[1:] / 199, torch.eye(6), atol=1e-4, rtol=0)
    other = table.clone()
    other[0] = 1e6
    assert torch.equal(whiten(other), white)


def test_the_map_is_symmetric_and_white_items_stay() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 3).double() * torch.tensor([1.0, 5.0, 0.1])
    white = whiten(table)
    centred = table[1:] - table[1:].mean(0)
    found = torch.linalg.lstsq(centred, white[1:].double()).solution
    torch.testing.assert_close(found, found.t(), atol=1e-4, rtol=1e-4)
    assert (torch.linalg.eigvalsh(found) > 0).all()
    torch.testing.assert_close(whiten(white), white, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_items", [3, 20])
def test_items_that_span_less_are_refused(n_items: int) -> None:
    """Fewer items than dimensions, or a direction without variance."""
    torch.manual_seed(0)
    table = torch.randn(n_items + 1, 5)
    table[:, 4] = 2.0
    with pytest.raises(ValueError, match=rf"span {min(n_items - 1, 4)} of 5 dimensions"):
        whiten(table)
