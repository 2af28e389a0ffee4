"""Pseudo-items without a model: the comparators of the generator."""

import torch
from torch import Tensor


def random_items(items: Tensor, ends: Tensor, n_pseudo: int, seed: int) -> Tensor:
    """Uniform items, the paper's "Random".

    Paper: any item. Here: those of the training part, so that what is tested alone cannot show.

    Args:
        items (LongTensor): training items, user after user, [n].
        ends (LongTensor): exclusive cumulative ends of the users, [n_users].
        n_pseudo (int): M, items a user.
        seed (int): of a generator of its own.

    Returns:
        LongTensor: [n_users, M].
    """
    generator = torch.Generator().manual_seed(seed)
    known = items.unique()
    return known[torch.randint(len(known), (len(ends), n_pseudo), generator=generator)]


def random_from_history(items: Tensor, ends: Tensor, n_pseudo: int, seed: int) -> Tensor:
    """Items drawn from the user's own training items with replacement, the paper's "Random-Seq".

    Paper: "randomly selected from the original sequence", no more; the code was not released.

    Args:
        items (LongTensor): training items, user after user, [n].
        ends (LongTensor): exclusive cumulative ends of the users, [n_users].
        n_pseudo (int): M, items a user.
        seed (int): of a generator of its own.

    Returns:
        LongTensor: [n_users, M]; 0 for a user without training items.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).unsqueeze(1)
    share = torch.rand(len(ends), n_pseudo, generator=generator, dtype=torch.float64)
    place = ends.unsqueeze(1) - lengths + (share * lengths).long()
    drawn = items[place.clamp(max=len(items) - 1)]
    return drawn.masked_fill(lengths == 0, 0)
