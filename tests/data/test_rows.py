"""Rows over a flat array."""

import torch

from recbole_simdiff.data.rows import gather_rows


def test_gathering_rows_of_any_shape() -> None:
    """Also of columns that hold vectors, and without a prefix in some rows."""
    values = torch.arange(1, 25).view(12, 2)
    start, length, k = torch.tensor([0, 4, 9]), torch.tensor([4, 2, 3]), torch.tensor([2, 0, 2])
    found = gather_rows(values, start, length, 5, k)
    zero = [0, 0]
    v = values.tolist()
    assert found.tolist() == [
        [v[0], v[0], v[0], v[1], zero],
        [v[4], v[5], zero, zero, zero],
        [v[9], v[9], v[9], zero, zero],
    ]
    pseudo = torch.tensor([[91, 92, 93], [94, 95, 96], [97, 98, 99]])
    flat = gather_rows(values[:, 0], start, length, 5, k, pseudo)
    assert flat.tolist() == [[92, 93, 1, 3, 0], [9, 11, 0, 0, 0], [98, 99, 19, 0, 0]]
    assert gather_rows(values[:, 0], start, length, 4).tolist() == [
        [1, 3, 5, 7],
        [9, 11, 0, 0],
        [19, 21, 23, 0],
    ]
