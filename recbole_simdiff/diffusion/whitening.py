"""Embeddings with the distribution that a diffusion process with N(0, I) noise assumes."""

import torch
from torch import Tensor


def whiten(table: Tensor) -> Tensor:
    """Item embeddings with zero mean and identity covariance over the items.

    The noise has the same variance in all directions. Without whitening a direction of small
    variance is lost in it at nearly every step, and the squared error hardly counts it. Of all
    linear maps that whiten, this is the symmetric one (ZCA): it changes the vectors least.

    Args:
        table (Tensor): padding in row 0, then the items, [N, d].

    Returns:
        Tensor: row 0 is 0, float32, [N, d].

    Raises:
        ValueError: if the items do not span all d dimensions.
    """
    items = table[1:].double()
    items = items - items.mean(0)
    values, vectors = torch.linalg.eigh(items.t() @ items / len(items))
    rank = int((values > 1e-10 * values[-1]).sum())
    if rank < len(values):
        raise ValueError(f"the items span {rank} of {len(values)} dimensions")
    white = items @ (vectors / values.sqrt()) @ vectors.t()
    return torch.cat([torch.zeros_like(white[:1]), white]).float()
