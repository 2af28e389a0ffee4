"""The low-rank form of an affine chain against the plain one; the chain itself in test_dreamrec."""

import pytest
import torch

from recbole_simdiff.diffusion import schedules
from recbole_simdiff.diffusion.affine import affine_chain
from recbole_simdiff.diffusion.process import ForwardProcess


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 6, 13])
def test_low_rank_equals_the_product(rank: int) -> None:
    """Below half of the dimensions, at it and above; columns of ``out`` may also coincide."""
    torch.manual_seed(rank)
    size, width, n_steps = 12, 4, 30
    betas = schedules.exponential_betas(n_steps, 0.1, 10.0)
    process = ForwardProcess(*schedules.variance_preserving(betas))
    out, b = torch.randn(size, rank).double(), torch.randn(size, width).double()
    project, g = torch.randn(rank, size).double(), torch.randn(n_steps, size).double()
    out *= 0.1
    if rank == 3:
        out[:, 1] = out[:, 0]
    expected = affine_chain(process, out @ project, None, b, g)
    found = affine_chain(process, out, project, b, g)
    for name, values in expected._asdict().items():
        # A root of nearly 0 has the root of the rounding errors.
        tolerance = 1e-7 if name == "root" else 1e-10
        torch.testing.assert_close(getattr(found, name), values, atol=tolerance, rtol=1e-10)
    torch.testing.assert_close(found.root @ found.root, found.noise + found.start @ found.start.t())


def test_no_product_of_large_matrices_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain is composed in 2 r dimensions and in one."""
    sizes = []
    eigh = torch.linalg.eigh

    def spy(matrix: torch.Tensor) -> object:
        sizes.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", spy)
    process = ForwardProcess(*schedules.variance_preserving(schedules.sqrt_betas(10)))
    out, g = torch.randn(100, 4).double(), torch.zeros(10, 100).double()
    affine_chain(process, out, torch.randn(4, 100).double(), out, g)
    assert sizes == [8, 1]
