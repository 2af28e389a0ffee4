"""Views against enumeration and exact counts: what each operator may do, and how often it does it.

Invariants are those of CL4SRec.
"""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from recbole_simdiff.modules import augmentations as views
from recbole_simdiff.modules.augmentations import uniform_noise

TOKEN = 99
RATIOS = [0.1, 0.25, 0.3, 0.5, 0.6, 0.7, 0.9]
N_DRAWS = 6000


def rows(*lengths: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows 1, 2, ..., n, right-padded."""
    place = torch.arange(1, (width or max(lengths)) + 1)
    length = torch.tensor(lengths)
    return torch.where(place <= length.unsqueeze(1), place, 0), length


def many(length: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The same row again and again: a batch of independent draws."""
    return rows(*[length] * N_DRAWS, width=width)


def floor(ratio: float, length: int) -> int:
    return int(Fraction(str(ratio)) * length)


def plausible(observed: Counter, expected: dict) -> bool:
    """Whether counts may come from these probabilities; nothing else may occur."""
    assert set(observed) <= set(expected)
    total = sum(observed.values())
    counts = [observed[key] for key in expected]
    return chisquare(counts, [p * total for p in expected.values()]).pvalue > 1e-3


def crop(seq: Tensor, length: Tensor, *settings: float) -> views.View:
    return views.crop(seq, length, uniform_noise(seq), *settings)


def mask(seq: Tensor, length: Tensor, *settings: float) -> views.View:
    return views.mask(seq, length, uniform_noise(seq), *settings)


def reorder(seq: Tensor, length: Tensor, *settings: float) -> views.View:
    return views.reorder(seq, length, uniform_noise(seq), *settings)


def two_views(seq: Tensor, length: Tensor, *settings: float, **more: float) -> list[views.View]:
    """The two views apart."""
    parts = (part.chunk(2) for part in views.two_views(seq, length, *settings, **more))
    return list(zip(*parts, strict=True))


def outcomes(seq: Tensor) -> Counter:
    return Counter(map(tuple, seq.tolist()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------- noise


def test_noise_is_uniform_and_padding_comes_last():
    seq, _ = rows(4, 2, 3)
    noise = uniform_noise(torch.zeros(2000, 4))
    assert noise.shape == (2000, 5)
    assert noise.min() >= 0
    assert noise.max() < 1
    for column in noise.t():
        assert kstest(column.numpy(), "uniform").pvalue > 1e-3
    torch.manual_seed(3)
    narrow = uniform_noise(seq)
    torch.manual_seed(3)
    assert torch.equal(uniform_noise(torch.nn.functional.pad(seq, (0, 7)))[:, :5], narrow)


# ---------------------------------------------------------------- crop


@pytest.mark.parametrize("keep", RATIOS)
def test_crop_keeps_a_slice_of_the_right_length(keep):
    """Invariant 7: max(1, floor(keep n)) items, contiguous, then padding."""
    seq, length = rows(*range(1, 201))
    view, view_len = crop(seq, length, keep)
    assert view_len.tolist() == [max(1, floor(keep, n)) for n in range(1, 201)]
    for items, n, kept in zip(view.tolist(), length.tolist(), view_len.tolist(), strict=True):
        first = items[0]
        assert items[:kept] == list(range(first, first + kept))
        assert 1 <= first <= n - kept + 1
        assert not any(items[kept:])


def test_every_slice_is_equally_likely():
    """Invariant 7: 6 of 10 items begin at 5 places."""
    starts = Counter(crop(*many(10, width=12), 0.6)[0][:, 0].tolist())
    assert plausible(starts, dict.fromkeys(range(1, 6), 1 / 5))


# ---------------------------------------------------------------- mask


@pytest.mark.parametrize("ratio", RATIOS)
def test_mask_replaces_the_right_number_of_items(ratio):
    """Invariant 8: floor(ratio n) tokens, all inside the row; the other items stay."""
    seq, length = rows(*range(1, 201))
    view, view_len = mask(seq, length, ratio, TOKEN + 900)
    masked = view == TOKEN + 900
    assert masked.sum(1).tolist() == [floor(ratio, n) for n in range(1, 201)]
    assert (seq[masked] > 0).all()
    assert torch.equal(view[~masked], seq[~masked])
    assert torch.equal(view_len, length)


def test_every_subset_is_equally_likely():
    """Invariant 8: 10 ways to choose 2 of 5; so every position is hit with probability 2 / 5."""
    view, _ = mask(*many(5, width=8), 0.4, TOKEN)
    hit = Counter(tuple(row.nonzero().flatten().tolist()) for row in view == TOKEN)
    assert plausible(hit, dict.fromkeys(itertools.combinations(range(5), 2), 1 / 10))


# ---------------------------------------------------------------- reorder


@pytest.mark.parametrize("ratio", RATIOS)
def test_reorder_moves_items_within_one_window_only(ratio):
    """Invariant 9: the items are the same; those that moved span floor(ratio n) at most."""
    seq, length = rows(*range(1, 201))
    view, view_len = reorder(seq, length, ratio)
    assert torch.equal(view.sort(1).values, seq.sort(1).values)
    assert torch.equal(view_len, length)
    for n, moved in enumerate(view != seq, start=1):
        where = moved.nonzero().flatten().tolist()
        assert not where or where[-1] - where[0] < floor(ratio, n)
        assert not moved[n:].any()
    assert (view != seq).any()


def test_every_window_and_order_is_equally_likely():
    """Invariant 9: 3 of 5 items have 3 windows and 6 orders each."""
    expected: Counter = Counter()
    for start in range(3):
        for order in itertools.permutations(range(start + 1, start + 4)):
            row = [1, 2, 3, 4, 5]
            row[start : start + 3] = order
            expected[(*row, 0, 0)] += Fraction(1, 18)
    observed = outcomes(reorder(*many(5, width=7), 0.6)[0])
    assert plausible(observed, {row: float(p) for row, p in expected.items()})
    assert len(observed) == len(expected) > 6


# ---------------------------------------------------------------- two views

RATES = {"crop_keep": 0.5, "mask_ratio": 0.4, "reorder_ratio": 0.8, "mask_token": TOKEN}


def operators(pair: list[views.View]) -> list[tuple[str, str]]:
    """Which operator made each of the two views, of rows 1, 2, ..., 10."""
    names = []
    for view, length in pair:
        names.append(
            [
                "crop" if n == 5 else "mask" if TOKEN in row else "reorder"
                for row, n in zip(view.tolist(), length.tolist(), strict=True)
            ]
        )
    return list(zip(*names, strict=True))


def test_the_two_operators_differ_and_all_pairs_are_equally_likely():
    """Invariant 11."""
    pairs = itertools.permutations(["crop", "mask", "reorder"], 2)
    observed = Counter(operators(two_views(*many(10), **RATES)))
    assert plausible(observed, dict.fromkeys(pairs, 1 / 6))


def test_with_replacement_the_two_operators_are_independent():
    pairs = itertools.product(["crop", "mask", "reorder"], repeat=2)
    observed = Counter(operators(two_views(*many(10), **RATES, replacement=True)))
    assert plausible(observed, dict.fromkeys(pairs, 1 / 9))


def test_both_views_start_from_the_row_itself():
    """What an operator did to one view does not show in the other; each keeps its own law."""
    seq, length = many(10, width=12)
    both = two_views(seq, length, **RATES)
    pairs = operators(both)
    for number, (view, view_len) in enumerate(both):
        for row, n, pair in zip(view.tolist(), view_len.tolist(), pairs, strict=True):
            if pair[number] == "crop":
                assert row == [*range(row[0], row[0] + 5), *[0] * 7]
            elif pair[number] == "mask":
                assert [item for item in row if item != TOKEN] == [
                    *(i for i in range(1, 11) if row[i - 1] != TOKEN),
                    0,
                    0,
                ]
                assert row.count(TOKEN) == 4
            else:
                assert sorted(row[:10]) == list(range(1, 11))
                assert row[10:] == [0, 0]
            assert n == (5 if pair[number] == "crop" else 10)


def test_views_of_the_same_operator_are_independent():
    """Twice one of two items masked: the same one half of the time."""
    rates = RATES | {"crop_keep": 1.0, "mask_ratio": 0.5, "reorder_ratio": 0.0}
    (first, _), (second, _) = two_views(*many(2), **rates, replacement=True)
    both = (first == TOKEN).any(1) & (second == TOKEN).any(1)
    same = Counter((first == second)[both].all(1).tolist())
    assert plausible(same, {True: 0.5, False: 0.5})


@pytest.mark.parametrize("replacement", [True, False])
def test_a_row_of_one_item_has_itself_as_views(replacement):
    """Invariant 10: whatever the ratios; and no view is ever empty."""
    seq, length = rows(1, 4, 1, 2, 3, 1)
    alone = length == 1
    for seed in range(50):
        torch.manual_seed(seed)
        for view, view_len in two_views(seq, length, 0.0, 1.0, 1.0, TOKEN, replacement):
            assert torch.equal(view[alone], seq[alone])
            assert view_len.min() >= 1
            assert torch.equal((view > 0).sum(1), view_len)


@pytest.mark.parametrize("replacement", [True, False])
def test_the_batch_is_never_written_to(replacement):
    """Invariant 6: in-place views would corrupt the batch and the other view."""
    seq, length = rows(1, 9, 5, 3, 8)
    before, before_len = seq.clone(), length.clone()
    for _ in range(50):
        for view, view_len in two_views(seq, length, **RATES, replacement=replacement):
            view.fill_(7)
            view_len.fill_(7)
    for view, view_len in (mask(seq, length, 0.5, TOKEN), reorder(seq, length, 0.8)):
        assert view.data_ptr() != seq.data_ptr()
        assert torch.equal(view_len, length)
    assert torch.equal(seq, before)
    assert torch.equal(length, before_len)


def test_padding_changes_no_view():
    """The same seed gives the same views however far the batch is padded."""
    lengths = (1, 9, 5, 3, 8)
    for seed in range(10):
        torch.manual_seed(seed)
        short = two_views(*rows(*lengths), **RATES)
        torch.manual_seed(seed)
        long = two_views(*rows(*lengths, width=40), **RATES)
        for (view, view_len), (wide, wide_len) in zip(short, long, strict=True):
            assert torch.equal(wide[:, :9], view)
            assert not wide[:, 9:].any()
            assert torch.equal(wide_len, view_len)


def test_nothing_waits_for_the_device():
    """Tensors without content have no value to look at, and no shape may depend on one."""
    seq, length = rows(1, 9, 5, 3, 8)
    view, view_len = views.two_views(seq.to("meta"), length, **RATES)
    assert view.shape == (10, 9)
    assert view_len.shape == (10,)
