"""Pseudo-items in front of rows: rows, targets, batches, evaluation, negatives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import BucketLoader, create_loaders
from recbole_simdiff.modules.batch import PSEUDO_LENGTH
from tests.conftest import write_inter
from tests.data.toy import LONG, all_rows, augmented, write_atomic


def pseudo_items(n_users: int, size: int, without: list[int]) -> torch.Tensor:
    """Items 101, 102, ... of user 1, 201, ... of user 2; none of user 0 and some others."""
    pseudo = 100 * torch.arange(n_users).unsqueeze(1) + torch.arange(1, size + 1)
    pseudo[[0, *without]] = 0
    return pseudo


def lists(part: Any) -> list[tuple[int, list[int], int]]:
    """(user, padded history, target) of every row, in order."""
    rows = all_rows(part)
    return list(
        zip(
            rows["user_id"].tolist(),
            rows["item_id_list"].tolist(),
            rows["item_id"].tolist(),
            strict=True,
        )
    )


def prepended(plain: Any, begins: list[bool], pseudo: Any, width: int, keep: bool) -> Any:
    """The rows that ``prepend`` should give, written row by row."""
    same, longer = [], []
    for (user, seq, target), first in zip(plain, begins, strict=True):
        real = [item for item in seq if item]
        made = [int(item) for item in pseudo[user] if item]
        k = min(len(made), width - len(real)) if first else 0
        row = [*made[len(made) - k :], *real]
        row += [0] * (width - len(row))
        same.append((user, seq if keep else row, target))
        longer += [(user, row, target)] if k else []
    return [*same, *longer] if keep else same


@pytest.mark.parametrize("keep", [True, False], ids=["both", "replace"])
@pytest.mark.parametrize(("width", "size"), [(4, 10), (12, 1), (12, 3)])
@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_rows_with_pseudo_items(
    make_config: Any, data_path: Path, style: str, width: int, size: int, keep: bool
) -> None:
    """T22, T23: as many of the nearest ones as there is room for; a full row stays as it is, and
    so does one that does not begin with the first item. Users, targets and order do not change."""
    write_inter(data_path, "long", LONG)
    values = {"dataset": "long", "train_sampling": style, "MAX_ITEM_LIST_LENGTH": width}
    config = make_config(**values)
    plain, part = (create_dataset(config).build()[0] for _ in range(2))
    begins = (plain.inter_feat["_row_start"] == plain.inter_feat["_history_start"]).tolist()
    pseudo = pseudo_items(plain.user_num, size, without=[4])
    before = plain.training_items()
    part.prepend(pseudo, keep_rows=keep)
    expected = prepended(lists(plain), begins, pseudo, width, keep)
    assert lists(part) == expected
    assert len(part) == len(expected) > len(plain) * keep
    rows = all_rows(part)
    assert rows["item_length"].tolist() == [sum(i > 0 for i in seq) for _, seq, _ in expected]
    assert rows[PSEUDO_LENGTH].tolist() == [sum(i > 100 for i in seq) for _, seq, _ in expected]
    assert torch.equal(part.inter_feat["item_id_list"][3], rows["item_id_list"][3])
    for found, wanted in zip(part.training_items(), before, strict=True):
        assert torch.equal(found, wanted)
    assert part.item_counter == plain.item_counter


def test_other_columns_repeat_their_first_real_value(make_config: Any, data_path: Path) -> None:
    """So that times stay in order and positions stay aligned."""
    lines = [f"u{u},i{k},{100 * u + k}" for u in (1, 2) for k in range(6)]
    header = "user_id:token,item_id:token,timestamp:float"
    write_atomic(data_path / "times" / "times.inter", header, lines)
    config = make_config(dataset="times", train_sampling="prefix_last", MAX_ITEM_LIST_LENGTH=5)
    part = create_dataset(config).build()[0]
    part.prepend(pseudo_items(3, 3, []), keep_rows=False)
    rows = all_rows(part)
    expected = [
        [100 * u] * min(3, 5 - n) + [100 * u + k for k in range(n)] + [0] * max(0, 2 - n)
        for u in (1, 2)
        for n in (1, 2, 3)
    ]
    assert rows["timestamp_list"].tolist() == expected


@pytest.mark.parametrize("keep", [True, False], ids=["both", "replace"])
def test_only_real_targets_are_expected(make_config: Any, data_path: Path, keep: bool) -> None:
    """Losses are divided by targets_per_batch: a pseudo-item is a token, but no target."""
    write_inter(data_path, "long", LONG)

    def built(style: str) -> Any:
        config = make_config(
            dataset="long", train_sampling=style, train_batch_size=7, MAX_ITEM_LIST_LENGTH=12
        )
        part = create_dataset(config).build()[0]
        part.prepend(pseudo_items(part.user_num, 3, []), keep_rows=keep)
        return part

    windows, prefixes = built("user_all"), built("prefix_last")
    # Windows of a, the older of which begins with the first item; of b, c, d, e.
    old, room = [12, 8, 8, 8, 1, 1], [0, 3, 3, 3, 3, 3]
    made = [k for k in room if k]
    n_rows = 6 + len(made) if keep else 6
    n_targets = sum(old) + (sum(n for n, k in zip(old, room, strict=True) if k) if keep else 0)
    assert len(windows) == n_rows
    assert windows.targets_per_batch == pytest.approx(min(7, n_rows) * n_targets / n_rows)
    tokens = n_targets + sum(made)
    assert windows.tokens_per_batch == pytest.approx(min(7, n_rows) * tokens / n_rows)
    assert prefixes.targets_per_batch == 7  # one a row


@pytest.mark.parametrize("mix", ["both", "replace"])
@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_a_batch_with_pseudo_items_equals_the_rows(data_path: Path, style: str, mix: str) -> None:
    write_inter(data_path, "long", LONG)
    config = augmented(data_path, "SimDiffRec", pseudo_mix=mix, train_sampling=style)
    dataset = create_dataset(config)
    train = create_loaders(config, dataset, pseudo_items(dataset.user_num, 3, [2]))[0]
    assert isinstance(train, BucketLoader)
    part = train.dataset
    assert torch.equal(torch.cat(train.batches()).sort().values, torch.arange(len(part)))
    seen = 0
    for index in train.batches():
        batch, rows = train.collate(index), part[index]
        longest = int(rows["item_length"].max())
        assert torch.equal(batch["item_id_list"], rows["item_id_list"][:, :longest])
        assert not rows["item_id_list"][:, longest:].any()
        for field in ("user_id", "item_length", "item_id", PSEUDO_LENGTH):
            assert torch.equal(batch[field], rows[field]), field
        seen += int((batch["item_id_list"] > 100).sum())
    assert seen == int(part.inter_feat[PSEUDO_LENGTH].sum()) > 0


def in_order(loader: Any) -> list[tuple[int, list[int], int]]:
    rows = []
    for batch in loader:
        for user, seq, n, target in zip(
            *(batch[key].tolist() for key in ("user_id", "item_id_list", "item_length", "item_id")),
            strict=True,
        ):
            rows.append((user, seq[:n], target))
    return rows


def test_recboles_loader_gives_the_same_rows(data_path: Path) -> None:
    """GRU4Rec trains on RecBole's own loader, this package's models on ours."""
    write_inter(data_path, "long", LONG)
    found = []
    for backbone, changes in (("GRU4Rec", {}), ("SimDiffRec", {"train_sampling": "prefix_last"})):
        config = augmented(data_path, backbone, **changes)
        dataset = create_dataset(config)
        pseudo = pseudo_items(dataset.user_num, 3, [2])
        train = create_loaders(config, dataset, pseudo)[0]
        found.append(sorted(in_order(train)))
        assert type(train).__name__ == (
            "TrainDataLoader" if backbone == "GRU4Rec" else "BucketLoader"
        )
    assert found[0] == found[1]
    assert any(item > 100 for _, seq, _ in found[0] for item in seq)


@pytest.mark.parametrize("backbone", ["GRU4Rec", "SimDiffRec"])
def test_evaluation_is_that_of_the_real_data(data_path: Path, backbone: str) -> None:
    """T23: every column of validation and test, their history pairs, and the sampler's items."""
    write_inter(data_path, "long", LONG)

    def loaders(pseudo: Any, **changes: Any) -> Any:
        config = augmented(data_path, backbone, **changes)
        return create_loaders(config, create_dataset(config), pseudo)

    pseudo = pseudo_items(6, 3, [2])
    plain, usual = loaders(None), loaders(pseudo)
    with_prefix = loaders(pseudo, pseudo_at_evaluation=True)
    for ours, theirs, longer in zip(usual[1:], plain[1:], with_prefix[1:], strict=True):
        for (batch, pairs, *rest), (other, others, *more), (changed, history, *places) in zip(
            ours, theirs, longer, strict=True
        ):
            assert set(batch.interaction) == set(other.interaction)
            for field, values in other.interaction.items():
                assert torch.equal(batch[field], values), field
                if field not in ("item_length", "item_id_list", "timestamp_list"):
                    assert torch.equal(changed[field], values), field
            for a, b, c in zip((*pairs, *rest), (*others, *more), (*history, *places), strict=True):
                assert torch.equal(a, b)
                assert torch.equal(c, b)
            begins = (other["_row_start"] == other["_history_start"]).tolist()
            assert lists(longer._dataset) == prepended(
                lists(theirs._dataset), begins, pseudo, 12, keep=False
            )
            assert changed[PSEUDO_LENGTH].any()


@pytest.mark.parametrize("mix", ["both", "replace"])
def test_negatives_are_drawn_as_without_pseudo_items(data_path: Path, mix: str) -> None:
    """T23: they never join the items that a user is known to have."""
    write_inter(data_path, "long", LONG)
    drawn, known = [], []
    for pseudo in (None, pseudo_items(6, 3, [2]).clamp(max=20)):
        config = augmented(data_path, "GRU4Rec", loss_type="BPR", pseudo_mix=mix, shuffle=False)
        dataset = create_dataset(config)
        torch.manual_seed(0)
        np.random.seed(0)
        train, _, _ = create_loaders(config, dataset, pseudo)
        known.append([set(map(int, items)) for items in train._sampler.used_ids])
        drawn.append([(b["user_id"].tolist(), b["neg_item_id"].tolist()) for b in train])
    assert known[0] == known[1]
    assert (
        drawn[1][: len(drawn[0]) if mix == "replace" else 2]
        == drawn[0][: None if mix == "replace" else 2]
    )


def test_sampled_evaluation_with_a_prefix(data_path: Path) -> None:
    """RecBole sorts these rows by user; each keeps its own prefix."""
    write_inter(data_path, "long", LONG)
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni2"}
    config = augmented(data_path, "GRU4Rec", eval_args=split, pseudo_at_evaluation=True)
    dataset = create_dataset(config)
    test = create_loaders(config, dataset, pseudo_items(dataset.user_num, 3, [2]))[2]
    for batch, *_ in test:
        for user, seq, k in zip(
            batch["user_id"].tolist(),
            batch["item_id_list"].tolist(),
            batch[PSEUDO_LENGTH].tolist(),
            strict=True,
        ):
            assert [i for i in seq if i > 100] == [100 * user + 4 - k + j for j in range(k)]


@pytest.mark.parametrize("backbone", ["GRU4Rec", "SimDiffRec"])
def test_pseudo_items_of_nobody_change_no_row(data_path: Path, backbone: str) -> None:
    """T24."""
    write_inter(data_path, "long", LONG)
    config = augmented(data_path, backbone)
    rows = []
    for pseudo in (None, torch.zeros(6, 3, dtype=torch.long)):
        torch.manual_seed(0)
        train = create_loaders(config, create_dataset(config), pseudo)[0]
        rows.append(in_order(train))
    assert rows[0] == rows[1]
