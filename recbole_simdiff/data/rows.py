"""Rows of sequences over a flat array of interactions: where they begin, and what they hold."""

import math

import torch
from torch import Tensor


def expand(count: Tensor) -> tuple[Tensor, Tensor]:
    """Enumerate the elements of all owners, those of the first owner first.

    Args:
        count (LongTensor): elements of each owner, [owners].

    Returns:
        tuple: owner of each element, and the element's number within it from 0, [elements] each.
    """
    owner = torch.repeat_interleave(torch.arange(len(count)), count)
    return owner, torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]


def windows(
    begin: Tensor, n_targets: Tensor, size: int, older_windows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut histories into windows that cover each target once, the newest window of a user first.

    Args:
        begin (LongTensor): where each user's history begins in the flat array, [users]; its targets
            are begin + 1, ..., begin + n_targets.
        n_targets (LongTensor): at least 1, [users].
        size (int): targets of a full window.
        older_windows (int): fewest targets of a window before the newest; 0 leaves all of them out.

    Returns:
        tuple: of each window, its user's place in ``begin``, and where its items start and its
            newest target is, [windows] each.
    """
    user, number = expand((n_targets + size - 1) // size)
    end = (begin + n_targets)[user] - number * size
    start = torch.maximum(begin[user], end - size)
    kept = (number == 0) | (end - start >= older_windows if older_windows else number < 0)
    return user[kept], start[kept], end[kept]


def gather_rows(
    values: Tensor,
    start: Tensor,
    length: Tensor,
    width: int,
    n_pseudo: Tensor | None = None,
    pseudo: Tensor | None = None,
) -> Tensor:
    """Rows of a flat column, right-padded with 0.

    Args:
        values (Tensor): the column, [n, ...].
        start (LongTensor): where each row's real values begin, [rows].
        length (LongTensor): of each row, pseudo-items included, [rows].
        width (int): columns of the result.
        n_pseudo (LongTensor | None): pseudo-items in front of each row, [rows].
        pseudo (LongTensor | None): they themselves, of which each row takes the last ones,
            [rows, M]; without it (columns other than items) the first real value is repeated.

    Returns:
        Tensor: [rows, width, ...].
    """
    place = torch.arange(width, device=start.device)
    inside = place < length.unsqueeze(1)
    offset = place if n_pseudo is None else (place - n_pseudo.unsqueeze(1)).clamp(min=0)
    picked = values[torch.where(inside, start.unsqueeze(1) + offset, 0)]
    if n_pseudo is not None and pseudo is not None:
        size = pseudo.shape[1]
        column = (size - n_pseudo.unsqueeze(1) + place).clamp(max=size - 1)
        picked = torch.where(place < n_pseudo.unsqueeze(1), pseudo.gather(1, column), picked)
    return picked.masked_fill(~inside.view(*inside.shape, *[1] * (picked.dim() - 2)), 0)


def drawn_users(n_users: int, fraction: float, seed: int) -> Tensor:
    """Whether a user's rows are trained on, [n_users]; a smaller fraction is part of a larger.

    Args:
        n_users (int): number of ids, padding included.
        fraction (float): of the users, in (0, 1].
        seed (int): of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_users - 1, generator=generator) + 1
    drawn = torch.zeros(n_users, dtype=torch.bool)
    drawn[order[: math.ceil(fraction * len(order))]] = True
    return drawn
