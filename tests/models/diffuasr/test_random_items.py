"""The random comparators draw legal items, and Random-Seq only the user's own."""

import torch

from recbole_simdiff.models.diffuasr.random_items import random_from_history, random_items

ITEMS = torch.tensor([3, 1, 4, 9, 2, 6, 5, 7])
ENDS = torch.tensor([3, 4, 4, 8])  # the third user has no training items
OWN = [{3, 1, 4}, {9}, {0}, {2, 6, 5, 7}]


def test_random_items_are_real_items():
    """T33: items of the training part, each as likely, however often it occurs there."""
    items = torch.tensor([1, 2, 2, 2, 2, 4, 5, 7])
    drawn = random_items(items, torch.arange(1, 501), 4, seed=1)
    assert drawn.shape == (500, 4)
    assert drawn.dtype == torch.long
    assert drawn.unique().tolist() == [1, 2, 4, 5, 7]
    count = drawn.flatten().bincount()
    assert 300 < count[count > 0].min() <= count.max() < 500  # 400 expected


def test_random_from_history_draws_the_users_items_only():
    """T33: all of them, in any number of places, and 0 where there are none."""
    drawn = random_from_history(ITEMS, ENDS, 200, seed=1)
    assert drawn.shape == (4, 200)
    assert [set(row.tolist()) for row in drawn] == OWN
    first = (drawn[0].unsqueeze(1) == ITEMS[:3]).sum(0)
    assert first.min() > 40  # 67 expected


def test_random_from_history_of_nobody():
    assert random_from_history(ITEMS, ENDS[:0], 3, seed=1).shape == (0, 3)
    last = torch.tensor([8, 8])  # nobody after the last item
    assert random_from_history(ITEMS, last, 3, seed=1)[1].tolist() == [0, 0, 0]


def test_draws_depend_on_the_seed_only():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = random_items(ITEMS, ENDS, 5, seed=1), random_from_history(ITEMS, ENDS, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    again = random_items(ITEMS, ENDS, 5, seed=1), random_from_history(ITEMS, ENDS, 50, seed=1)
    other = random_items(ITEMS, ENDS, 5, seed=2), random_from_history(ITEMS, ENDS, 50, seed=2)
    for first, same, different in zip(one, again, other, strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, different)
