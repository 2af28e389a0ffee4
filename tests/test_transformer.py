"""The packed layout, and the Transformer on it against RecBole's own."""

import pytest
import torch
from recbole.model.layers import TransformerEncoder

from recbole_simdiff.modules.transformer import (
    Batch,
    PackedTransformer,
    TokenLayout,
    layout_of,
    on_host,
)

LENGTHS = torch.tensor([3, 1, 5, 2])
L, HIDDEN = 5, 8
SIZES = {
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": HIDDEN,
    "inner_size": 16,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def pair(**changes):
    """Our Transformer and RecBole's with the same large random weights."""
    torch.manual_seed(0)
    theirs = TransformerEncoder(**{**SIZES, **changes})
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = PackedTransformer(**{**SIZES, **changes})
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def padded_input(length: int = L) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), length, HIDDEN)


def recbole_mask(length: int, causal: bool) -> torch.Tensor:
    """RecBole's additive mask, [B, 1, L or 1, L]."""
    allowed = (torch.arange(length) < LENGTHS.unsqueeze(1))[:, None, None, :]
    if causal:
        allowed = torch.tril(allowed.expand(-1, -1, length, -1))
    return torch.where(allowed, 0.0, -10000.0)


# ---------------------------------------------------------------- layout


def test_layout_of_a_small_batch_by_hand():
    """Rows [a b c .], [d . . .]: four tokens."""
    layout = TokenLayout(torch.tensor([3, 1]), 4)
    assert layout.index.tolist() == [0, 1, 2, 4]
    assert layout.row.tolist() == [0, 0, 0, 1]
    assert layout.position.tolist() == [0, 1, 2, 0]
    assert layout.last.tolist() == [2, 3]
    assert layout.keys.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert not layout.full


def test_layout_that_keeps_padding_by_hand():
    """All cells are tokens; keys and newest positions stay those of the real items."""
    layout = TokenLayout(torch.tensor([3, 1]), 4, with_padding=True)
    assert layout.index.tolist() == list(range(8))
    assert layout.row.tolist() == [0] * 4 + [1] * 4
    assert layout.position.tolist() == [0, 1, 2, 3] * 2
    assert layout.last.tolist() == [2, 4]
    assert layout.keys.sum(1).tolist() == [3, 1]
    assert layout.full


def test_pack_keeps_the_real_tokens_in_order():
    layout = TokenLayout(torch.tensor([3, 1]), 4)
    padded = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]])
    assert layout.pack(padded).tolist() == [1, 2, 3, 4]


def test_unpack_puts_tokens_back_and_fills_the_rest():
    layout = TokenLayout(torch.tensor([3, 1]), 4)
    out = layout.unpack(torch.tensor([1.0, 2.0, 3.0, 4.0]), fill=-5.0)
    assert out.tolist() == [[1.0, 2.0, 3.0, -5.0], [4.0, -5.0, -5.0, -5.0]]


@pytest.mark.parametrize("lengths", [[3, 1, 5, 2], [5, 5, 5, 5], [1, 1, 1, 1]])
def test_pack_undoes_unpack(lengths):
    layout = TokenLayout(torch.tensor(lengths), L)
    packed = torch.randn(sum(lengths), 2, 3)
    assert layout.full == (min(lengths) == L)
    assert torch.equal(layout.pack(layout.unpack(packed)), packed)


def test_last_points_at_the_newest_token_of_each_row():
    layout = TokenLayout(LENGTHS, L)
    assert layout.row[layout.last].tolist() == [0, 1, 2, 3]
    assert layout.position[layout.last].tolist() == (LENGTHS - 1).tolist()


# ---------------------------------------------------------------- against RecBole


def test_parameters_and_initial_values_are_recboles():
    torch.manual_seed(3)
    theirs = TransformerEncoder(**SIZES).state_dict()
    torch.manual_seed(3)
    ours = PackedTransformer(**SIZES).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("act", ["gelu", "relu", "swish"])
def test_values_equal_recboles_on_every_real_token(causal, act):
    ours, theirs = pair(hidden_act=act)
    x, layout = padded_input(), TokenLayout(LENGTHS, L)
    expected = theirs(x, recbole_mask(L, causal), output_all_encoded_layers=True)[-1]
    out = ours(layout.pack(x), layout, causal=causal)
    torch.testing.assert_close(out, layout.pack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_recboles(causal):
    ours, theirs = pair()
    x, layout = padded_input(), TokenLayout(LENGTHS, L)
    weight = torch.randn(int(LENGTHS.sum()), HIDDEN)
    expected = theirs(x, recbole_mask(L, causal), output_all_encoded_layers=True)[-1]
    (layout.pack(expected) * weight).sum().backward()
    (ours(layout.pack(x), layout, causal=causal) * weight).sum().backward()
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, want.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[3, 1, 5, 2], [5, 5, 5, 5]])
def test_last_only_is_the_newest_row_of_the_full_output(n_layers, causal, lengths):
    """Also for a batch without padding, which takes a path of its own."""
    ours, _ = pair(n_layers=n_layers)
    layout = TokenLayout(torch.tensor(lengths), L)
    packed = layout.pack(padded_input())
    full = ours(packed, layout, causal=causal)
    newest = ours(packed, layout, causal=causal, last_only=True)
    torch.testing.assert_close(newest, full[layout.last], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- what a token sees


@pytest.mark.parametrize("causal", [True, False])
def test_change_of_an_item_reaches_the_right_positions(causal):
    """Invariants 19 and 20: older positions are blind to it if causal, and see it if not."""
    ours, _ = pair()
    layout = TokenLayout(torch.tensor([L]), L)
    x = padded_input()[2]
    for i in range(L):
        changed = x.clone()
        changed[i] += 1.0
        moved = (ours(changed, layout, causal) - ours(x, layout, causal)).abs().amax(1) > 1e-4
        assert moved.tolist() == [not causal or j >= i for j in range(L)]


def test_rows_do_not_see_each_other():
    ours, _ = pair()
    x, layout = padded_input(), TokenLayout(LENGTHS, L)
    changed = x.clone()
    changed[0] += 1.0
    for causal in (True, False):
        moved = ours(layout.pack(changed), layout, causal) - ours(layout.pack(x), layout, causal)
        assert not moved[layout.row != 0].any()
        assert moved[layout.row == 0].any()


@pytest.mark.parametrize("causal", [True, False])
def test_appended_padding_changes_nothing(causal):
    """Invariant 19: whatever stands in the padding cells."""
    ours, _ = pair()
    x = padded_input(L + 4)
    short, long = TokenLayout(LENGTHS, L), TokenLayout(LENGTHS, L + 4)
    torch.testing.assert_close(
        ours(long.pack(x), long, causal),
        ours(short.pack(x[:, :L]), short, causal),
        atol=1e-5,
        rtol=1e-5,
    )


def test_padding_cells_that_are_kept_are_never_keys():
    """The released diffusion loss computes on padding, yet attends to real items only."""
    ours, _ = pair()
    layout = TokenLayout(LENGTHS, L, with_padding=True)
    x = padded_input()
    changed = torch.where(layout.keys.unsqueeze(-1), x, 100.0)
    real = layout.keys.flatten()
    out = ours(layout.pack(x), layout, causal=False)
    other = ours(layout.pack(changed), layout, causal=False)
    torch.testing.assert_close(other[real], out[real])
    assert not torch.allclose(other[~real], out[~real])
    packed = TokenLayout(LENGTHS, L)
    torch.testing.assert_close(
        out[real], ours(packed.pack(x), packed, causal=False), atol=1e-5, rtol=1e-5
    )


HIDDEN_KEYS = {  # row -> real cells that nothing attends to; lengths are 3, 1, 5, 2
    "the middle": [(0, 1), (2, 1), (2, 3)],
    "the oldest": [(0, 0), (2, 0), (2, 1), (3, 0)],
    "the newest": [(0, 2), (2, 4), (3, 1)],
}


@pytest.mark.parametrize("cells", HIDDEN_KEYS)
@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_hidden_keys_are_those_of_an_explicit_mask(cells, last_only, causal):
    """RecBole's mask by item 0. A token that sees no key is nobody's key; its state is finite."""
    ours, theirs = pair()
    keys = torch.arange(L) < LENGTHS.unsqueeze(1)
    for cell in HIDDEN_KEYS[cells]:
        keys[cell] = False
    layout, x = TokenLayout(LENGTHS, L, keys=keys), padded_input()
    allowed = keys[:, None, None, :].expand(-1, -1, L, -1)
    mask = torch.where(allowed.tril() if causal else allowed, 0.0, -10000.0)
    expected = layout.pack(theirs(x, mask, output_all_encoded_layers=True)[-1])
    out = ours(layout.pack(x), layout, causal=causal, last_only=last_only)
    out.sum().backward()
    if last_only:
        expected = expected[layout.last]
    elif causal:
        sees = layout.pack((mask.squeeze(1) == 0).any(2))
        assert sees.all() == (cells != "the oldest")
        out, expected = out[sees], expected[sees]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_kept_padding_of_a_causal_pass_sees_everything():
    """As the padding before left-padded rows does, whose mask of -10000 cancels out."""
    ours, theirs = pair()
    layout, x = TokenLayout(LENGTHS, L, with_padding=True), padded_input()
    allowed = layout.keys[:, None, None, :].expand(-1, -1, L, -1).tril()
    allowed = allowed & layout.keys[:, None, :, None]
    expected = theirs(x, torch.where(allowed, 0.0, -10000.0), output_all_encoded_layers=True)[-1]
    out = layout.unpack(ours(layout.pack(x), layout, causal=True))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- dropout


def test_attention_dropout_acts_in_training_only():
    ours, _ = pair(attn_dropout_prob=0.5)
    layout = TokenLayout(LENGTHS, L)
    packed = layout.pack(padded_input())
    ours.train()
    assert not torch.equal(ours(packed, layout, True), ours(packed, layout, True))
    ours.eval()
    assert torch.equal(ours(packed, layout, True), ours(packed, layout, True))


def test_hidden_dropout_acts_in_training_only():
    ours, _ = pair(hidden_dropout_prob=0.5)
    layout = TokenLayout(LENGTHS, L)
    packed = layout.pack(padded_input())
    ours.train()
    assert not torch.equal(ours(packed, layout, True), ours(packed, layout, True))
    ours.eval()
    assert torch.equal(ours(packed, layout, True), ours(packed, layout, True))


def test_lengths_known_on_the_host_change_nothing():
    seen = TokenLayout(LENGTHS, L)
    columns = {"items": torch.zeros(len(LENGTHS), L, dtype=torch.long), "length": LENGTHS}
    batch = Batch(columns).to(torch.device("cpu"))
    known = layout_of(batch, "items", "length")
    assert known.host_lengths is columns["length"]
    for name in ("index", "row", "last", "position", "full"):
        one, other = (torch.as_tensor(getattr(layout, name)) for layout in (seen, known))
        assert torch.equal(one, other), name
    assert torch.equal(seen.index, seen.real.flatten().nonzero().squeeze(1))
    padded = TokenLayout(LENGTHS, L, with_padding=True)
    assert torch.equal(padded.index, torch.arange(len(LENGTHS) * L))
    values = torch.arange(len(LENGTHS) * L)
    assert torch.equal(padded.of_real(values), seen.index)


def test_what_a_model_puts_into_a_batch_is_what_the_host_has():
    """A model may change its batch, and call what this package's models do with it."""
    columns = {"items": torch.ones(len(LENGTHS), L, dtype=torch.long), "length": LENGTHS}
    device = {name: values.clone() for name, values in columns.items()}  # as on a GPU
    batch = Batch(device, columns)
    assert on_host(batch, "items") is columns["items"]
    batch["length"] = torch.ones_like(LENGTHS)
    batch["items"][:, 0] = 7
    batch["new"] = LENGTHS + 1
    for given in (batch, batch.to(torch.device("cpu"))):
        assert layout_of(given, "items", "length").host_lengths.tolist() == [1] * len(LENGTHS)
        assert on_host(given, "items")[:, 0].tolist() == [7] * len(LENGTHS)
        assert torch.equal(on_host(given, "new"), LENGTHS + 1)


def test_a_batch_is_moved_as_recbole_moves_one():
    columns = {"items": torch.ones(2, L), "length": torch.tensor([1, 2])}
    moved = Batch(columns).to(torch.device("meta"), selected_field="items")
    assert [moved[name].device.type for name in columns] == ["meta", "cpu"]
    assert on_host(moved, "items") is columns["items"]
