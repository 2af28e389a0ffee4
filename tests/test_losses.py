"""Losses against dense formulas and against values worked by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from recbole_simdiff.modules.losses import (
    SIMILARITIES,
    full_softmax_loss,
    info_nce,
    largest,
    logit_blocks,
    nt_xent,
    rows_per_block,
    sampled_bce_loss,
)

N_TOKENS, N_ITEMS, HIDDEN = 23, 37, 8


def budget(n_rows: int) -> float:
    """MiB for a block of that many rows of logits."""
    return n_rows * 4 * N_ITEMS / 2**20


# (H, budget in MiB, rows of a block). A block has at least H rows, so H = 1 gives the short ones.
BLOCKS = [
    (1, 0.0, 1),
    (1, budget(2), 2),
    (1, budget(5), 5),
    (8, 0.0, 8),
    (8, budget(N_TOKENS), N_TOKENS),
    (8, 16.0, 113359),
]
EVERY_BLOCK = pytest.mark.parametrize(("hidden_size", "memory_mb", "n_rows"), BLOCKS)


def problem(
    n: int = N_TOKENS, hidden_size: int = HIDDEN, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, table and targets; both matrices want gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, hidden_size, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(N_ITEMS, hidden_size, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(N_ITEMS, (n,), generator=generator)
    return hidden, table, target


def dense(hidden, table, target):
    return F.cross_entropy(hidden @ table.t(), target, reduction="sum")


# ---------------------------------------------------------------- blocks


def test_rows_per_block_counts_float32_logits():
    assert rows_per_block(torch.empty(1024, 8), 1.0) == 256  # 256 rows of 4 KiB are 1 MiB
    assert rows_per_block(torch.empty(1023, 8), 1.0) == 256
    assert rows_per_block(torch.empty(1025, 8), 1.0) == 255


def test_a_block_is_never_smaller_than_a_copy_of_the_table():
    assert rows_per_block(torch.empty(10_000, 64), 0.001) == 64


@EVERY_BLOCK
def test_budgets_of_this_file_mean_the_rows_they_claim(hidden_size, memory_mb, n_rows):
    """Otherwise the block sizes below could silently all be the same."""
    assert rows_per_block(torch.empty(N_ITEMS, hidden_size), memory_mb) == n_rows


@EVERY_BLOCK
def test_logit_blocks_cover_every_row_once(hidden_size, memory_mb, n_rows):
    hidden, table, _ = problem(hidden_size=hidden_size)
    out = torch.full((N_TOKENS, N_ITEMS), torch.nan)
    sizes = []
    for part, logits in logit_blocks(hidden, table, memory_mb):
        out[part] = logits
        sizes.append(len(logits))
    torch.testing.assert_close(out, (hidden @ table.t()).detach())
    assert len(sizes) == math.ceil(N_TOKENS / n_rows)
    assert max(sizes) <= n_rows


def test_logit_blocks_reuse_one_buffer():
    """The memory bound holds only if no block is kept alive."""
    hidden, table, _ = problem()
    places = {logits.data_ptr() for _, logits in logit_blocks(hidden, table, 0.0)}
    assert len(places) == 1


def test_logit_blocks_of_nothing():
    hidden, table, _ = problem(0)
    assert list(logit_blocks(hidden, table, 16.0)) == []


@pytest.mark.parametrize("width", [30, 64 * 4 * 3 - 1, 64 * 4 * 3, 1000, 12_102])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_largest_are_those_of_a_full_sort(width, k):
    """Short rows, rows of whole groups, and rows with a rest that holds some of the largest."""
    scores = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    scores[::2, -k:] += 10.0
    values, columns = largest(scores, k)
    assert torch.equal(values, scores.sort(1, descending=True).values[:, :k])
    assert torch.equal(scores.gather(1, columns), values)
    assert torch.equal(columns, scores.argsort(1, descending=True)[:, :k])
    unordered = largest(scores, k, ordered=False)[1]
    assert torch.equal(unordered.sort(1).values, columns.sort(1).values)


def test_largest_of_nothing_and_of_columns_that_do_not_count():
    assert largest(torch.empty(0, 5000), 3)[1].shape == (0, 3)
    scores = torch.full((1, 5000), -torch.inf)
    scores[0, [7, 4999]] = torch.tensor([1.0, 2.0])
    values, columns = largest(scores, 2)
    assert (values.tolist(), columns.tolist()) == ([[2.0, 1.0]], [[4999, 7]])


# ---------------------------------------------------------------- full softmax


@EVERY_BLOCK
def test_chunked_cross_entropy_equals_dense(hidden_size, memory_mb, n_rows):
    """Invariant 25: value 1e-6 relative, both gradients 1e-5, also scaled by what comes after."""
    hidden, table, target = problem(hidden_size=hidden_size)
    loss = full_softmax_loss(hidden, table, target, memory_mb)
    grads = torch.autograd.grad(3.0 * loss, [hidden, table])
    expected = dense(hidden, table, target)
    expected_grads = torch.autograd.grad(3.0 * expected, [hidden, table])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    """Invariant 25, without autograd's own cross-entropy as a reference."""
    hidden, table, target = problem(4, hidden_size=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, e: full_softmax_loss(h, e, target, 0.0), (hidden, table)
    )


def test_cross_entropy_of_two_items_by_hand():
    """Logits 0 and log 3: the loss is -log(3/4), the gradient p - onehot."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    table = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    loss = full_softmax_loss(hidden, table, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert table.grad.flatten().tolist() == pytest.approx([0.25, -0.25])
    assert hidden.grad.item() == pytest.approx(-0.25 * math.log(3.0))


def test_one_token_equals_dense():
    hidden, table, target = problem(1)
    torch.testing.assert_close(
        full_softmax_loss(hidden, table, target), dense(hidden, table, target)
    )


def test_no_tokens_cost_nothing():
    hidden, table, target = problem(0)
    loss = full_softmax_loss(hidden, table, target)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(table.grad, torch.zeros(N_ITEMS, HIDDEN))


def test_no_tokens_cost_nothing_under_autocast():
    hidden, table, target = problem(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax_loss(hidden, table, target)
    loss.backward()
    assert loss.item() == 0.0
    assert not table.grad.any()


def test_repeated_targets_add_up():
    """index_add over equal targets must not keep only the last one."""
    hidden, table, _ = problem()
    target = torch.zeros(N_TOKENS, dtype=torch.long)
    grad = torch.autograd.grad(full_softmax_loss(hidden, table, target), table)[0]
    want = torch.autograd.grad(dense(hidden, table, target), table)[0]
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, table, target = problem()
    loss = full_softmax_loss(1e3 * hidden, table, target)
    torch.testing.assert_close(loss, dense(1e3 * hidden, table, target))
    assert torch.isfinite(torch.autograd.grad(loss, table)[0]).all()


def test_part_of_a_table_gets_the_gradient_of_that_part():
    """The diffusion loss leaves the padding row out by slicing it off."""
    hidden, table, target = problem()
    target = target.clamp(min=1)
    grad = torch.autograd.grad(full_softmax_loss(hidden, table[1:], target - 1), table)[0]
    want = torch.autograd.grad(dense(hidden, table[1:], target - 1), table)[0]
    assert not grad[0].any()
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


@EVERY_BLOCK
def test_bfloat16_products_stay_close_to_dense(hidden_size, memory_mb, n_rows):
    """Invariant 25 under autocast: value 1 %, gradients 2 % of their norm, float32 out."""
    hidden, table, target = problem(hidden_size=hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax_loss(hidden, table, target, memory_mb)
    grads = torch.autograd.grad(loss, [hidden, table])
    expected = dense(hidden, table, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert loss.item() != expected.item()  # the products did run in bfloat16
    for got, want in zip(grads, torch.autograd.grad(expected, [hidden, table]), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()


def test_bfloat16_queries_get_bfloat16_gradients():
    """Under autocast the encoder's output is bfloat16; its gradient must be too."""
    hidden, table, target = problem()
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = full_softmax_loss(low, table, target)
    loss.backward()
    want = torch.autograd.grad(dense(hidden, table, target), hidden)[0]
    assert low.grad.dtype == torch.bfloat16
    assert (low.grad.float() - want).norm() < 0.02 * want.norm()


# ---------------------------------------------------------------- sampled BCE


def test_sampled_bce_by_hand():
    """Scores log 3 (right) and -log 4 (wrong): -log(3/4) - log(4/5)."""
    hidden = torch.tensor([[1.0]])
    table = torch.tensor([[0.0], [math.log(3.0)], [-math.log(4.0)]])
    loss = sampled_bce_loss(hidden, table, torch.tensor([1]), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(3 / 4) - math.log(4 / 5))


def test_sampled_bce_sums_binary_cross_entropies():
    hidden, table, target = problem()
    negative = (target + 5) % N_ITEMS
    right, wrong = (hidden * table[target]).sum(-1), (hidden * table[negative]).sum(-1)
    expected = F.binary_cross_entropy_with_logits(
        torch.cat([right, wrong]),
        torch.cat([torch.ones(N_TOKENS), torch.zeros(N_TOKENS)]),
        reduction="sum",
    )
    torch.testing.assert_close(sampled_bce_loss(hidden, table, target, negative), expected)


# ---------------------------------------------------------------- InfoNCE

TAU = 0.05


def views(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchor, positive, negative = torch.randn(3, batch, HIDDEN, generator=generator)
    return anchor, positive, negative


def by_hand(anchor, positive, negative, tau):
    """Eq. 17 written out: one anchor at a time, one cosine at a time."""
    total = 0.0
    for b, q in enumerate(anchor):
        keys = [*positive, *(negative if negative is not None else [])]
        terms = [torch.cosine_similarity(q, k, dim=0).item() / tau for k in keys]
        total += -terms[b] + math.log(sum(math.exp(x) for x in terms))
    return total / len(anchor)


def test_info_nce_equals_the_formula_written_out():
    """Invariant 15: own positive against 2B - 1 wrong keys, mean over the anchors."""
    anchor, positive, negative = views(5)
    loss = info_nce(anchor, positive, TAU, negative)
    assert loss.item() == pytest.approx(by_hand(anchor, positive, negative, TAU), rel=1e-4)


def test_info_nce_without_hard_negatives_equals_the_formula_written_out():
    """Invariant 16: the first B columns only."""
    anchor, positive, _ = views(5)
    loss = info_nce(anchor, positive, TAU)
    assert loss.item() == pytest.approx(by_hand(anchor, positive, None, TAU), rel=1e-4)


def test_info_nce_of_two_by_two_by_hand():
    """Orthogonal unit vectors, tau = 1: every anchor sees cosine 1 once and 0 once."""
    eye = torch.eye(2)
    assert info_nce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert info_nce(eye, eye.flip(0), 1.0).item() == pytest.approx(1 + math.log(1 + math.exp(-1)))


def test_contrastive_matrix_is_bounded_and_twice_as_wide_as_high(monkeypatch):
    """Invariant 15: [B, 2B], entries in [-1/tau, 1/tau]; the diagonal is the target."""
    seen = {}
    cross_entropy = F.cross_entropy

    def record(logits, target):
        seen["logits"], seen["target"] = logits, target
        return cross_entropy(logits, target)

    monkeypatch.setattr(F, "cross_entropy", record)
    anchor, positive, negative = views(5)
    info_nce(anchor, positive, TAU, negative)
    logits = seen["logits"]
    assert logits.shape == (5, 10)
    assert logits.abs().max() <= 1 / TAU + 1e-4
    assert seen["target"].tolist() == [0, 1, 2, 3, 4]
    cosine = torch.cosine_similarity(anchor, negative)
    torch.testing.assert_close(logits[:, 5:].diagonal() * TAU, cosine)


def test_one_row_with_equal_views_gives_log_two():
    """Invariant 15: B = 1 and s- == s+ leaves two equal choices."""
    anchor, positive, _ = views(1)
    assert info_nce(anchor, positive, TAU, positive).item() == pytest.approx(math.log(2), rel=1e-5)


def test_one_row_without_hard_negatives_gives_zero():
    """Invariant 16: nothing to be told apart from."""
    anchor, positive, _ = views(1)
    assert info_nce(anchor, positive, TAU).item() == 0.0


def test_info_nce_does_not_depend_on_the_order_of_the_batch():
    """Invariant 15."""
    anchor, positive, negative = views(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(
        info_nce(anchor[order], positive[order], TAU, negative[order]),
        info_nce(anchor, positive, TAU, negative),
    )


def test_info_nce_does_not_depend_on_the_length_of_vectors():
    """Invariant 15: cosine similarity."""
    anchor, positive, negative = views(6)
    torch.testing.assert_close(
        info_nce(7.0 * anchor, 0.1 * positive, TAU, 30.0 * negative),
        info_nce(anchor, positive, TAU, negative),
    )


def test_info_nce_refuses_unlike_shapes():
    with pytest.raises(ValueError, match=r"\(2, 8\) and \(3, 8\) must match"):
        info_nce(torch.ones(2, 8), torch.ones(3, 8), TAU)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_info_nce_refuses_temperatures_that_are_not_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        info_nce(torch.ones(2, 8), torch.ones(2, 8), temperature)


# ---------------------------------------------------------------- NT-Xent


def nt_xent_by_hand(first, second, tau, similarity):
    """Each of the 2B rows in turn; its partner against all rows but itself."""
    rows = [*first, *second]
    total = 0.0
    for i, z in enumerate(rows):
        partner = (i + len(first)) % len(rows)
        score = {}
        for j, other in enumerate(rows):
            if similarity == "cosine":
                score[j] = torch.cosine_similarity(z, other, dim=0).item() / tau
            else:
                score[j] = (z @ other).item() / tau
        positive = score.pop(i)
        assert positive is not None
        assert len(score) == 2 * len(first) - 1
        total += -score[partner] + math.log(sum(math.exp(x) for x in score.values()))
    return total / len(rows)


EVERY_SIMILARITY = pytest.mark.parametrize("similarity", SIMILARITIES)


@EVERY_SIMILARITY
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_nt_xent_equals_the_double_loop(similarity, tau):
    """Invariants 12, 13: one partner and 2B - 2 others for each of 2B rows."""
    first, second, _ = views(5)
    loss = nt_xent(first, second, tau, similarity)
    assert loss.item() == pytest.approx(nt_xent_by_hand(first, second, tau, similarity), rel=1e-4)


@EVERY_SIMILARITY
def test_nt_xent_is_symmetric(similarity):
    """Invariant 12: swapping the views, or the rows of both, changes nothing."""
    first, second, _ = views(5)
    loss = nt_xent(first, second, 0.5, similarity)
    torch.testing.assert_close(nt_xent(second, first, 0.5, similarity), loss)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent(first[order], second[order], 0.5, similarity), loss)


@EVERY_SIMILARITY
def test_nt_xent_of_one_row_is_zero(similarity):
    """Invariant 12: B = 1 leaves the partner alone."""
    first, second, _ = views(1)
    assert nt_xent(first, second, 1.0, similarity).item() == 0.0


@EVERY_SIMILARITY
def test_nt_xent_of_equal_rows_is_the_log_of_their_number(similarity):
    """Invariants 12, 13: 2B - 1 equal choices for each row."""
    same = torch.ones(4, HIDDEN)
    assert nt_xent(same, same, 1.0, similarity).item() == pytest.approx(math.log(7))


def test_nt_xent_excludes_a_row_from_its_own_choices():
    """Invariant 12: its dot product with itself would win by far."""
    first = 20.0 * torch.eye(2, HIDDEN)
    second = 0.01 * first
    loss = nt_xent(first, second, 1.0, "dot")
    # Rows: 400 with itself, 4 with the partner, 0 with the two others.
    large = math.log(1 + 2 * math.exp(-4))
    small = math.log(math.exp(4) + 2) - 4
    assert loss.item() == pytest.approx((large + small) / 2, rel=1e-4)


@EVERY_SIMILARITY
def test_nt_xent_within_groups(similarity):
    """Rows of one group are no wrong answers of each other; the partner stays the right one."""
    first, second, _ = views(4)
    group = torch.tensor([5, 2, 5, 5])
    alone = nt_xent(first[:2], second[:2], 0.5, similarity)  # rows 0 and 1 are of two groups
    pair = nt_xent(first[:2], second[:2], 0.5, similarity, group[:2])
    torch.testing.assert_close(pair, alone)
    # Rows 0, 2 and 3 are left with row 1 only, and row 1 with all of them.
    z = torch.cat([first, second])
    z = torch.nn.functional.normalize(z, dim=-1) if similarity == "cosine" else z
    s = z @ z.t() / 0.5
    terms = []
    for i in range(8):
        wrong = [j for j in range(8) if group[j % 4] != group[i % 4]]
        choices = s[i, [(i + 4) % 8, *wrong]]
        terms.append(choices.logsumexp(0) - choices[0])
    loss = nt_xent(first, second, 0.5, similarity, group)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert loss < nt_xent(first, second, 0.5, similarity)


def test_nt_xent_of_one_group_has_no_wrong_answer():
    first, second, _ = (v.clone().requires_grad_() for v in views(4))
    loss = nt_xent(first, second, 0.5, "dot", torch.full((4,), 3))
    grads = torch.autograd.grad(loss, [first, second])
    assert loss.item() == 0
    assert not any(g.any() for g in grads)


def test_nt_xent_by_cosine_does_not_depend_on_the_length_of_vectors():
    first, second, _ = views(5)
    loss = nt_xent(first, second, 0.5, "cosine")
    torch.testing.assert_close(nt_xent(7.0 * first, 0.1 * second, 0.5, "cosine"), loss)
    assert not torch.allclose(nt_xent(7.0 * first, 0.1 * second, 0.5, "dot"), loss)


def test_nt_xent_gradient_reaches_both_views():
    first, second, _ = (v.clone().requires_grad_() for v in views(5))
    grads = torch.autograd.grad(nt_xent(first, second, 1.0, "dot"), [first, second])
    assert all(torch.isfinite(g).all() and g.any(1).all() for g in grads)


def test_nt_xent_is_float32_under_autocast():
    """Dot products of unnormalised states reach hundreds; bfloat16 would round them to units."""
    first, second, _ = views(5)
    expected = nt_xent(9 * first, 9 * second, 1.0, "dot")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(9 * first, 9 * second, 1.0, "dot"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8), torch.ones(3, 8), 1.0, "dot"), r"\(2, 8\) and \(3, 8\) must"),
        ((torch.ones(2, 8), torch.ones(2, 8), 0.0, "dot"), "temperature must be positive, got 0.0"),
        ((torch.ones(2, 8), torch.ones(2, 8), 1.0, "l2"), "'l2' is not one of cosine, dot"),
    ],
)
def test_nt_xent_refuses_what_it_cannot_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(*arguments)
