"""Data sets and loaders: RecBole's rows over flat arrays, our batches, and RecBole's faults."""

import gzip
import itertools
import os
import pickle
import re
import urllib.error
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import recbole.data.dataset.dataset as recbole_dataset
import torch
from recbole.data.dataset import SequentialDataset

from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import parse_overrides, properties_dir, read_yaml
from recbole_simdiff.data.dataset import create_dataset, gather_rows
from recbole_simdiff.data.loaders import BucketLoader, create_loaders
from recbole_simdiff.data.recbole_fixes import HostFixes
from recbole_simdiff.data.statistics import Statistics
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.modules.batch import PSEUDO_LENGTH, TARGET
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES, SMALL, write_inter

# Far longer than the maximum length of 4; "a" and "b" repeat items, "c" ends on a full window.
LONG = {
    "a": [f"i{k}" for k in range(20)] + ["i3", "i3", "i0"],
    "b": ["i5", "i5", "i5", "i7", "i5", "i7", "i5", "i8", "i5", "i9", "i5"],
    "c": [f"i{k}" for k in range(11)],
    "d": ["i1", "i2", "i3"],
    "e": ["i4", "i6"],
}
HEADER = "user_id:token,item_id:token,timestamp:float"
LOAD = {"inter": ["user_id", "item_id", "timestamp"]}


class RecBoleRows(HostFixes, SequentialDataset):
    """RecBole's own rows; only the faults that stop it on today's pandas are mended."""


class RecBoleRowsInExactOrder(RecBoleRows):
    """The same, with the interactions in exact time order before RecBole rounds the times."""

    def _change_feat_format(self) -> None:
        self.inter_feat = self.inter_feat.sort_values(
            [self.uid_field, self.time_field], kind="stable", ignore_index=True
        )
        super()._change_feat_format()


def write_atomic(path: Path, header: str, rows: list[str]) -> Path:
    """Write an atomic file; ``header`` and ``rows`` use a comma for the tab."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]).replace(",", "\t") + "\n")
    return path


def matrix(rows: Any) -> np.ndarray:
    """(user, target, length, padded items) of every row, sorted: equal matrices, equal rows."""
    columns = [
        rows["user_id"].unsqueeze(1),
        rows["item_id"].unsqueeze(1),
        rows["item_length"].unsqueeze(1),
        rows["item_id_list"],
    ]
    table = torch.cat(columns, 1).numpy()
    return table[np.lexsort(table.T)]


def all_rows(part: Any) -> Any:
    return part[torch.arange(len(part))]


def readable(part: Any) -> list[tuple[str, list[str], str]]:
    """(user, history, target) of every row in raw ids, in a fixed order."""
    rows, users, items = all_rows(part), part.field2id_token["user_id"], part.field2id_token
    found = []
    for user, seq, length, target in zip(
        rows["user_id"], rows["item_id_list"], rows["item_length"], rows["item_id"], strict=True
    ):
        names = [str(items["item_id"][i]) for i in seq[:length]]
        found.append((str(users[user]), names, str(items["item_id"][target])))
    return sorted(found)


def raw(dataset: Any, field: str, ids: Any) -> list[str]:
    return [str(token) for token in dataset.field2id_token[field][np.asarray(ids, int)]]


# ---------------------------------------------------------------- rows equal RecBole's


@pytest.mark.parametrize(
    ("dataset", "reference", "values"),
    [
        ("toy", RecBoleRows, {}),
        ("toy", RecBoleRows, {"MAX_ITEM_LIST_LENGTH": 2}),
        ("ml-100k", RecBoleRowsInExactOrder, {"MAX_ITEM_LIST_LENGTH": 10}),
    ],
)
def test_rows_equal_those_of_recbole(
    make_config: Any, dataset: str, reference: Any, values: dict[str, Any]
) -> None:
    config = make_config(dataset=dataset, train_sampling="prefix_last", **values)
    theirs, ours = reference(config).build(), create_dataset(config).build()
    for name, their_part, our_part in zip(("train", "valid", "test"), theirs, ours, strict=True):
        expected = matrix(their_part.inter_feat)
        assert len(expected) > 0, name
        np.testing.assert_array_equal(matrix(all_rows(our_part)), expected, err_msg=name)


@pytest.mark.parametrize(
    "index",
    [
        [2, 0],
        np.array([2, 0]),
        torch.tensor([2, 0]),
        slice(0, 3),
        torch.tensor([True] + [False] * 13 + [True]),
    ],
    ids=["list", "array", "tensor", "slice", "mask"],
)
def test_every_kind_of_index_that_recbole_uses(make_config: Any, index: Any) -> None:
    train = create_dataset(make_config(train_sampling="prefix_last")).build()[0]
    everything = all_rows(train)
    assert len(train) == 15  # the mask above counts on it
    picked = train[index]
    where = torch.arange(len(train))[index]
    for field in ("user_id", "item_id", "item_length", "item_id_list", "timestamp_list"):
        assert torch.equal(picked[field], everything[field][where]), field
    # RecBole reads sequence columns of the interactions directly, too.
    column = train.inter_feat["item_id_list"]
    assert torch.equal(column[index], everything["item_id_list"][where])
    assert torch.equal(column[3], everything["item_id_list"][3])
    assert len(column) == len(train)


# ---------------------------------------------------------------- training samples


def test_both_samplings_see_each_training_target_once(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "long", LONG)
    parts = {
        style: create_dataset(make_config(dataset="long", train_sampling=style)).build()
        for style in ("user_all", "prefix_last")
    }
    # Of n items the first is no target, and the last two are held out (of 3 items, only the last).
    expected = Counter(
        (user, item)
        for user, items in LONG.items()
        for item in items[1 : len(items) - {2: 0, 3: 1}.get(len(items), 2)]
    )
    prefixes = Counter((user, target) for user, _, target in readable(parts["prefix_last"][0]))
    assert prefixes == expected

    windows = readable(parts["user_all"][0])
    targets = Counter((u, item) for u, seq, target in windows for item in [*seq[1:], target])
    assert targets == expected
    for user, seq, target in windows:
        window, items = [*seq, target], LONG[user]
        slices = [items[k : k + len(window)] for k in range(len(items))]
        assert window in slices, f"{window} is not a stretch of {user}'s history"
        assert 1 <= len(seq) <= 4
    # The newest windows are full; 20 targets of "a" in windows of 4 are 5 rows.
    assert Counter(user for user, _, _ in windows) == {"a": 5, "b": 2, "c": 2, "d": 1, "e": 1}
    assert ("a", LONG["a"][16:20], LONG["a"][20]) in windows

    for part in (1, 2):
        held_out = readable(parts["user_all"][part])
        assert held_out == readable(parts["prefix_last"][part])
        assert held_out


@pytest.mark.parametrize(("least", "n"), [(0, 3), (1, 6), (2, 5), (3, 4), (5, 3)])
def test_older_windows_can_be_left_out(
    make_config: Any, data_path: Path, least: int, n: int
) -> None:
    """Windows of 4 and 4 and 2 targets, of 3, and of 4 and 1, the newest first."""
    sizes = {"a": 10, "b": 3, "c": 5}
    names = {user: [f"i{k}" for k in range(size + 3)] for user, size in sizes.items()}
    write_inter(data_path, "windows", names)

    def rows(**values: Any) -> list[tuple[int, int, int]]:
        config = make_config(dataset="windows", train_sampling="user_all", **values)
        found = create_dataset(config).build()[0].inter_feat
        columns = (found[key].tolist() for key in ("user_id", "item_length", TARGET))
        return sorted(zip(*columns, strict=True))

    whole = rows()
    newest = {user: max(end for other, _, end in whole if other == user) for user, _, _ in whole}
    found = rows(older_windows=least)
    assert found == [
        (user, length, end)
        for user, length, end in whole
        if end == newest[user] or (least and length >= least)
    ]
    assert (len(found), len(whole)) == (n, 6)


def test_expected_targets_per_batch_follow_the_sampling(make_config: Any, data_path: Path) -> None:
    """Losses are divided by this; a wrong value scales every gradient."""
    write_inter(data_path, "long", LONG)

    def built(style: str) -> Any:
        config = make_config(dataset="long", train_sampling=style, train_batch_size=11)
        return create_dataset(config).build()[0]

    windows, prefixes = built("user_all"), built("prefix_last")
    n_targets = 20 + 8 + 8 + 1 + 1
    assert len(windows) == 11
    assert windows.targets_per_batch == pytest.approx(n_targets)
    assert windows.tokens_per_batch == pytest.approx(n_targets)
    assert len(prefixes) == n_targets
    assert prefixes.targets_per_batch == 11
    lengths = [min(k, 4) for n in (20, 8, 8, 1, 1) for k in range(1, n + 1)]
    assert prefixes.tokens_per_batch == pytest.approx(11 * sum(lengths) / n_targets)


def test_user_all_refuses_a_split_that_is_not_by_time(make_config: Any) -> None:
    train = create_dataset(make_config(train_sampling="prefix_last")).build()[0]
    with_a_hole = train.copy(train.inter_feat[torch.tensor([0, 2])])
    with pytest.raises(UserError, match=r"beginning of the history.*Use train_sampling=prefix_l"):
        with_a_hole._windows()


# user -> (item, time); the times of users interleave, and fit float32 exactly.
TIMED = {
    "a": [(f"i{k}", 10 * k) for k in range(1, 9)],
    "b": [(f"i{k}", 10 * k + 45) for k in range(1, 6)],
    "c": [(f"i{k}", k + 60) for k in range(1, 8)],
}


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_a_global_split_trains_on_nothing_later_than_what_it_evaluates(
    make_config: Any, data_path: Path, style: str
) -> None:
    """Whoever it is of; and every later interaction but a user's first is evaluated once."""
    rows = [f"{u},{i},{t}" for u, own in TIMED.items() for i, t in own]
    write_atomic(data_path / "timed" / "timed.inter", HEADER, rows)
    split = {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": None, "order": "TO", "mode": "full"}
    config = make_config("SimDiffRec", "timed", eval_args=split, train_sampling=style)
    dataset = create_dataset(config)
    train, valid, test = dataset.build()

    def times(part: Any) -> list[float]:
        """Of all targets: of a window, as many as it has items."""
        last = part.inter_feat[TARGET]
        n = part.inter_feat[part.item_list_length_field] if part is train else last * 0 + 1
        whole = style == "user_all" and part is train
        first = last - n + 1 if whole else last
        flat = dataset.flat["timestamp"]
        places = [
            k for a, b in zip(first.tolist(), last.tolist(), strict=True) for k in range(a, b + 1)
        ]
        return sorted(flat[torch.tensor(places)].tolist())

    found = [times(part) for part in (train, valid, test)]
    wanted = sorted(float(t) for own in TIMED.values() for _, t in own[1:])
    assert list(itertools.chain(*found)) == wanted
    assert list(map(len, found)) == [11, 3, 3]
    assert max(found[0]) <= min(found[1])
    assert max(found[1]) <= min(found[2])


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_a_share_of_the_users_is_trained_on_and_all_are_evaluated(
    make_config: Any, data_path: Path, style: str
) -> None:
    sequences = {f"u{n}": [f"i{(n + k) % 15}" for k in range(3 + n % 6)] for n in range(40)}
    write_inter(data_path, "forty", sequences)

    def users(share: float, seed: int = 1) -> tuple[set[int], list[int]]:
        config = make_config(
            "SimDiffRec", "forty", train_sampling=style, train_fraction=share, seed=seed
        )
        train, valid, test = create_dataset(config).build()
        return set(train.inter_feat["user_id"].tolist()), [len(valid), len(test)]

    whole, evaluated = users(1.0)
    smaller, larger = users(0.25), users(0.5)
    assert smaller[0] < larger[0] < whole
    assert len(smaller[0]) <= 10
    assert len(larger[0]) <= 20
    assert smaller[1] == larger[1] == evaluated
    assert users(0.5, seed=2)[0] != larger[0]
    assert users(0.5)[0] == larger[0]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_outside_0_and_1_is_refused(make_config: Any, share: float) -> None:
    with pytest.raises(UserError, match=r"train_fraction=.* must lie in \(0, 1\]"):
        make_config(train_fraction=share)


def test_users_with_one_to_four_items(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "few", {f"u{n}": [f"i{k}" for k in range(n)] for n in (1, 2, 3, 4)})
    values = {"dataset": "few", "k_noise": 1, "k_sample": 1}
    dataset = create_dataset(make_config(train_sampling="prefix_last", **values))
    train, valid, test = dataset.build()
    assert readable(train) == [("u2", ["i0"], "i1"), ("u3", ["i0"], "i1"), ("u4", ["i0"], "i1")]
    assert readable(valid) == [("u4", ["i0", "i1"], "i2")]
    assert readable(test) == [("u3", ["i0", "i1"], "i2"), ("u4", ["i0", "i1", "i2"], "i3")]
    assert dataset.user_num - 1 == 4  # u1 has no row but stays a user


def test_no_training_rows_is_an_error(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "single", {"u1": ["i1"], "u2": ["i3"]})
    with pytest.raises(UserError, match=r"'single' has no training rows.*: 2 users"):
        create_dataset(make_config(dataset="single")).build()


# ---------------------------------------------------------------- training batches


@pytest.fixture
def many(make_config: Any, data_path: Path) -> Any:
    """many(**config) -> (config, training part) of 40 users with 3 to 19 items."""
    sequences = {f"u{k}": [f"i{(k + j) % 23}" for j in range(3 + k * 7 % 17)] for k in range(40)}
    write_inter(data_path, "many", sequences)

    def make(**values: Any) -> Any:
        values = {"MAX_ITEM_LIST_LENGTH": 12, "train_batch_size": 8, **values}
        config = make_config(dataset="many", **values)
        return config, create_dataset(config).build()[0]

    return make


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_batches_hold_every_row_once_with_similar_lengths(many: Any, style: str) -> None:
    config, train = many(train_sampling=style)
    loader = BucketLoader(config, train)
    batches = loader.batches()
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(len(train)))
    assert len(batches) == len(loader) > 4
    assert sorted(map(len, batches))[1:] == [8] * (len(batches) - 1)

    lengths = train.inter_feat["item_length"]
    spans = sorted((int(lengths[b].min()), int(lengths[b].max())) for b in batches)
    for (_, longest), (shortest, _) in itertools.pairwise(spans):
        assert longest <= shortest  # the batches cut the sorted lengths into stretches
    by_chance = lengths[torch.randperm(len(lengths))].split(8)
    spread = sum(high - low for low, high in spans)
    assert spread < 0.5 * sum(int(part.max() - part.min()) for part in by_chance)

    for index, batch in zip(batches, loader, strict=True):
        assert batch["item_id_list"].shape == (len(index), int(lengths[index].max()))


def test_batch_order_depends_on_seed_and_epoch_only(many: Any) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        config, train = many(seed=seed)
        loader = BucketLoader(config, train)
        loader.set_epoch(epoch)
        torch.manual_seed(epoch + 17)  # the global state must not matter
        return [index.tolist() for index in loader.batches()]

    first = order(1, 0)
    assert order(1, 0) == first
    assert order(1, 1) != first
    assert order(2, 0) != first
    assert {frozenset(b) for b in order(1, 1)} != {frozenset(b) for b in first}
    lengths = [len(many()[1][torch.tensor(b)]["item_id_list"][0]) for b in first]
    assert len(set(lengths)) == 1
    longest = [int(many()[1].inter_feat["item_length"][b].max()) for b in first]
    assert longest != sorted(longest)  # short batches do not all come first


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_a_batch_equals_the_rows_of_the_data_set(many: Any, style: str) -> None:
    config, train = many(train_sampling=style)
    loader = BucketLoader(config, train)
    for index in loader.batches():
        batch, rows = loader.collate(index), train[index]
        longest = batch["item_id_list"].shape[1]
        assert torch.equal(batch["item_id_list"], rows["item_id_list"][:, :longest])
        assert not rows["item_id_list"][:, longest:].any()
        for field in ("user_id", "item_length", "item_id"):
            assert torch.equal(batch[field], rows[field]), field


def test_without_shuffling_rows_come_in_order(many: Any) -> None:
    config, train = many(shuffle=False)
    loader = BucketLoader(config, train)
    assert torch.cat(loader.batches()).tolist() == list(range(len(train)))


# ---------------------------------------------------------------- earlier items of a row


def test_history_holds_all_earlier_items_but_never_the_target(
    make_config: Any, data_path: Path
) -> None:
    write_inter(data_path, "long", LONG)
    train, valid, test = create_dataset(
        make_config(dataset="long", train_sampling="prefix_last")
    ).build()
    for part, end in ((valid, -2), (test, -1)):
        rows = all_rows(part)
        row, item = part.history(rows)
        found: dict[int, list[str]] = {k: [] for k in range(len(rows))}
        for k, name in zip(row.tolist(), raw(part, "item_id", item), strict=True):
            found[k].append(name)
        for k, user in enumerate(raw(part, "user_id", rows["user_id"])):
            sequence = LONG[user] if len(LONG[user]) > 3 else [*LONG[user]]
            place = len(sequence) + end
            target = sequence[place]
            assert raw(part, "item_id", rows["item_id"][[k]]) == [target]
            assert found[k] == [item for item in sequence[:place] if item != target]
    # "b" repeats its test target i5 seven times: it must not be taken out of its own ranking.
    rows = all_rows(test)
    user = raw(test, "user_id", rows["user_id"]).index("b")
    row, item = test.history(rows)
    assert set(raw(test, "item_id", item[row == user])) == {"i7", "i8", "i9"}
    assert len(train.history(train[[0]])[0]) == 1


def test_evaluation_batches_carry_the_history(build: Any) -> None:
    _, _, valid, test, _ = build()
    for loader in (valid, test):
        for interaction, history, rows, targets in loader:
            assert history is not None
            row, item = history
            assert row.max() < len(interaction)
            assert torch.equal(rows, torch.arange(len(interaction)))
            assert torch.equal(targets, interaction["item_id"])
            assert not (item == targets[row]).any()


# ---------------------------------------------------------------- faults of RecBole


def test_exact_time_order_where_float32_cannot_tell_seconds_apart(
    make_config: Any, data_path: Path
) -> None:
    items = [f"i{k}" for k in range(9)]
    times = [1_500_000_000 + 30 * k for k in range(9)]
    assert len(np.unique(np.float32(times))) < len(times)
    newest_first = [f"u,{i},{t}" for i, t in zip(items[::-1], times[::-1], strict=True)]
    path = data_path / "seconds" / "seconds.inter"
    write_atomic(path, "user_id:token,item_id:token,timestamp:float", newest_first)
    config = make_config(dataset="seconds", train_sampling="prefix_last", MAX_ITEM_LIST_LENGTH=20)

    (user, history, target) = readable(create_dataset(config).build()[2])[0]
    assert (user, [*history, target]) == ("u", items)

    rounded = RecBoleRows(config).build()[2].inter_feat  # what float32 makes of the same file
    dataset = create_dataset(config)
    wrong = raw(dataset, "item_id", rounded["item_id_list"][0][: rounded["item_length"][0]])
    assert wrong != history


@pytest.fixture
def with_holes(data_path: Path) -> Path:
    """A data set whose optional columns have empty cells."""
    folder = data_path / "holes"
    write_atomic(
        folder / "holes.inter",
        "user_id:token,item_id:token,timestamp:float,rating:float,place:token,tags:token_seq",
        [
            "u1,i1,1,2.0,home,red blue",
            "u1,i2,2,,,",
            "u1,i3,3,4.0,shop,blue",
            "u1,i1,4,3.0,home,",
            "u2,i2,1,,shop,red",
            "u2,i3,2,3.0,,green",
            "u2,i1,3,3.0,home,red",
            "u2,i2,4,3.0,home,red",
        ],
    )
    write_atomic(
        folder / "holes.item",
        "item_id:token,kind:token,genre:token_seq,year:float,vector:float_seq",
        ["i1,a,x y,1990,0.5 1.5", "i2,,,,", "i3,b,y,2000,2.5"],
    )
    return folder


def test_missing_values_of_interactions(make_config: Any, with_holes: Path) -> None:
    config = make_config(dataset="holes", load_col=None, k_noise=1)
    dataset = create_dataset(config)
    dataset.build()
    flat = dataset.flat
    assert flat["rating"].tolist() == [2.0, 3.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0]  # 3.0 is the mean
    assert raw(dataset, "place", flat["place"]) == [
        *("home", "[PAD]", "shop", "home"),
        *("shop", "[PAD]", "home", "home"),
    ]
    assert [raw(dataset, "tags", row) for row in flat["tags"]] == [
        ["red", "blue"],
        ["[PAD]", "[PAD]"],
        ["blue", "[PAD]"],
        ["[PAD]", "[PAD]"],
        ["red", "[PAD]"],
        ["green", "[PAD]"],
        ["red", "[PAD]"],
        ["red", "[PAD]"],
    ]


def test_missing_values_of_items(make_config: Any, with_holes: Path) -> None:
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "kind", "genre", "year", "vector"]},
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    ids = raw(dataset, "item_id", item["item_id"])
    rows = {name: k for k, name in enumerate(ids)}
    assert raw(dataset, "kind", item["kind"][[rows["i1"], rows["i2"], rows["i3"]]]) == [
        *("a", "[PAD]", "b")
    ]
    assert raw(dataset, "genre", item["genre"][rows["i1"]]) == ["x", "y"]
    assert raw(dataset, "genre", item["genre"][rows["i2"]]) == ["[PAD]", "[PAD]"]
    assert item["year"][[rows["i1"], rows["i2"], rows["i3"]]].tolist() == [1990, 1995, 2000]
    assert item["vector"][rows["i2"]].tolist() == [0, 0]
    assert item["vector"][rows["i3"]].tolist() == [2.5, 0]


def test_lines_without_a_user_or_an_item_are_left_out(
    make_config: Any, data_path: Path, caplog: Any
) -> None:
    lines = [",i1,1", "u1,i1,1", "u1,,2", "u1,i2,3", "u1,i3,4"]
    columns = "user_id:token,item_id:token,timestamp:float"
    write_atomic(data_path / "gaps" / "gaps.inter", columns, lines)
    dataset = create_dataset(make_config(dataset="gaps"))
    dataset.build()
    assert raw(dataset, "item_id", dataset.flat["item_id"]) == ["i1", "i2", "i3"]
    assert "2 of 5 lines of inter_feat have no user_id or no item_id" in caplog.text


@pytest.mark.parametrize("time", ["", "inf"])
def test_events_without_a_time_are_refused(make_config: Any, data_path: Path, time: str) -> None:
    """The mean, which RecBole fills in, would put them anywhere."""
    columns = "user_id:token,item_id:token,timestamp:float"
    write_atomic(data_path / "gaps" / "gaps.inter", columns, ["u1,i1,1", "", f"u1,i2,{time}"])
    message = rf"1 of 2 events.*no finite.*timestamp.*is event 2 of the file \(line 4: '{time}'\)"
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(dataset="gaps"))


@pytest.mark.parametrize("form", ["{}", "{}.0", "{}e0"])
def test_times_that_floats_cannot_tell_apart_keep_their_order(
    make_config: Any, data_path: Path, form: str
) -> None:
    """Nanoseconds: neighbours beyond 2^53 are one float, and would stay in the order of the file.
    A user's events are put in order whatever the settings do with the times."""
    times = [1_700_000_000_000_000_000 + k for k in range(9)]
    assert len(set(map(float, times))) == 1
    newest_first = [f"u,i{k},{form.format(times[k])}" for k in range(8, -1, -1)]
    write_atomic(data_path / "nano" / "nano.inter", HEADER, ["v,i0,2", *newest_first])
    for values in ({}, {"normalize_all": True}, {"rm_dup_inter": "first"}):
        dataset = create_dataset(make_config(dataset="nano", MAX_ITEM_LIST_LENGTH=20, **values))
        _, history, target = readable(dataset.build()[2])[0]
        assert [*history, target] == [f"i{k}" for k in range(9)]


@pytest.mark.parametrize(("field", "cell"), [("timestamp", "nan"), ("when", "1.5.2024")])
def test_a_number_that_is_none_is_named_with_its_line(
    make_config: Any, data_path: Path, field: str, cell: str
) -> None:
    """Neither before the blank line nor in a column that is not loaded."""
    columns = f"user_id:token,item_id:token,other:float,{field}:float"
    write_atomic(data_path / "bad" / "bad.inter", columns, ["u1,i1,y,1", "", f"u1,i2,y,{cell}"])
    config = make_config(
        dataset="bad", TIME_FIELD=field, load_col={"inter": ["user_id", "item_id", field]}
    )
    with pytest.raises(UserError, match=rf"bad\.inter, line 4: {field}:float='{cell}' is not a n"):
        create_dataset(config)


# ---------------------------------------------------------------- lines and their fields


LINES = [f"u{u},i{(u + k) % 6},5,{k}" for u in range(8) for k in range(5)]
RATED = "user_id:token,item_id:token,rating:float,timestamp:float"


@pytest.mark.parametrize("where", [range(40), [0], [33]], ids=["all", "first", "one"])
@pytest.mark.parametrize("more", [",1", ",1,", ",,"])
def test_lines_with_more_fields_than_the_header_are_refused(
    make_config: Any, data_path: Path, where: Any, more: str
) -> None:
    """Whichever columns are loaded; pandas reads all of them from the wrong fields, or none."""
    lines = [line + (more if k in where else "") for k, line in enumerate(LINES)]
    path = write_atomic(data_path / "long" / "long.inter", RATED, lines)
    message = rf"{path}, line {where[0] + 2}: {4 + more.count(',')} fields, but the header has 4"
    for columns in (LOAD, None):
        with pytest.raises(UserError, match=message):
            create_dataset(make_config(dataset="long", load_col=columns))


@pytest.mark.parametrize("header", [RATED, RATED + ","])
def test_a_separator_may_end_a_line(make_config: Any, data_path: Path, header: str) -> None:
    write_atomic(data_path / "ends" / "ends.inter", header, [line + "," for line in LINES])
    dataset = create_dataset(make_config(dataset="ends"))
    assert str(dataset.statistics).startswith("8 users, 6 items, 40 actions")
    dataset.build()
    assert dataset.flat["timestamp"].tolist() == [0, 1, 2, 3, 4] * 8


def test_a_line_with_too_many_fields_among_items_is_refused(
    make_config: Any, data_path: Path
) -> None:
    """As by a tab inside a title; also where only the titles are read."""
    path = data_path / "toy" / "toy.item"
    write_atomic(path, "item_id:token,title:token_seq", ["i1,One", "i2,T,wo"])
    message = r"toy\.item, line 3: 3 fields, but the header has 2 columns"
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(load_col={**LOAD, "item": ["item_id"]}))
    dataset = create_dataset(make_config(item_title_field="title"))
    with pytest.raises(UserError, match=message):
        dataset.item_titles()


@pytest.mark.parametrize(
    ("typed", "separator"),
    [
        ("|", "|"),
        (" ", " "),
        ("::", "::"),
        ("||", "||"),
        (".*", ".*"),
        (r"\t", "\t"),
        (r"'\t'", "\t"),
        (r'"\t"', "\t"),
        ("'|'", "|"),
        ("'", "'"),
        ("\N{BROKEN BAR}", "\N{BROKEN BAR}"),
        (r"\t\t", "\t\t"),
    ],
)
def test_a_separator_is_what_was_typed(data_path: Path, typed: str, separator: str) -> None:
    """Never a pattern, and never guessed; a first and a last cell may be empty."""
    columns = ["note:token", *RATED.split(","), "tags:token_seq"]
    lines = [columns, *(["", *line.split(","), "x;y" if k else ""] for k, line in enumerate(LINES))]
    path = data_path / "apart" / "apart.inter"
    path.parent.mkdir()
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n", encoding="utf-8")
    arguments = [f"--field_separator={typed}", "--seq_separator", ";", "--load_col=None"]
    values = parse_overrides([*arguments, f"--data_path={data_path}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        dataset = create_dataset(Config("SASRec", "apart", overrides=values))
    dataset.build()
    assert str(dataset.statistics).startswith("8 users, 6 items, 40 actions")
    assert dataset.flat["timestamp"].tolist() == [0, 1, 2, 3, 4] * 8
    assert raw(dataset, "tags", dataset.flat["tags"][1]) == ["x", "y"]
    assert dataset.flat["note"].tolist() == [0] * 40


def test_files_that_are_no_text_get_their_cause(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    text = path.read_text()

    def refused(message: str, name: str = "inter", **values: Any) -> None:
        place = re.escape(str(path.with_suffix(f".{name}")))
        with pytest.raises(UserError, match=place + message):
            create_dataset(make_config(**values))

    path.write_bytes(gzip.compress(text.encode()))
    refused(" is packed by gzip; unpack it")
    refused(" is packed by gzip; unpack it", encoding="latin-1")
    path.write_text("")
    refused(" is empty; its first line names the columns")
    path.write_bytes(text.replace("i12", "\xed12").encode("latin-1"))
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "i12" in row)
    refused(f", line {line} is not text in encoding='utf-8'")
    path.unlink()
    path.mkdir()
    refused(" is a folder, not a file")
    path.rmdir()
    os.mkfifo(path)
    refused(" is not a regular file")
    path.unlink()
    path.write_text(text)
    path.with_suffix(".item").mkdir()
    assert create_dataset(make_config()).statistics.actions == 30  # nothing of it is asked for
    loaded = {**LOAD, "item": ["item_id", "brand"]}
    refused(" is a folder, not a file", "item", load_col=loaded)


@pytest.mark.parametrize("call", ["open", "stat"])
def test_a_file_that_may_not_be_read_is_named(
    make_config: Any, data_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, config = data_path / "toy" / "toy.inter", make_config()
    stock = {"open": open, "stat": Path.stat}[call]

    def denied(name: Any, *given: Any, **named: Any) -> Any:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stock(name, *given, **named)

    monkeypatch.setattr(*{"open": ("builtins.open",), "stat": (Path, "stat")}[call], denied)
    with pytest.raises(UserError, match=rf"{path} cannot be read.*Permission denied"):
        create_dataset(config)


def test_a_byte_order_mark_is_no_part_of_the_first_name(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert create_dataset(make_config()).statistics.actions == 30


def test_another_encoding_is_named_and_can_be_set(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy" / "toy.inter"
    text = path.read_text().replace("user_id", "usér").replace("i1", "í1")
    path.write_text(text, encoding="latin-1")
    values = {"USER_ID_FIELD": "usér", "load_col": {"inter": ["usér", "item_id", "timestamp"]}}
    with pytest.raises(
        UserError, match=r"toy\.inter, line 1 is not text in encoding=.*--encoding="
    ):
        create_dataset(make_config(**values))
    found = create_dataset(make_config(encoding="latin-1", **values))
    assert "í1" in found.field2id_token["item_id"]


def test_items_without_a_line_in_the_item_file(make_config: Any, with_holes: Path) -> None:
    path = with_holes / "holes.item"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # i3 is gone
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "kind", "genre"]},
        filter_inter_by_user_or_item=False,
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    row = raw(dataset, "item_id", item["item_id"]).index("i3")
    assert raw(dataset, "genre", item["genre"][row]) == ["[PAD]", "[PAD]"]
    assert raw(dataset, "kind", item["kind"][[row]]) == ["[PAD]"]


def lines_about(path: Path, kind: str, ids: list[str]) -> dict[str, Any]:
    """Write a .user or .item file of these ids; the setting that loads it."""
    write_atomic(
        path.with_suffix(f".{kind}"), f"{kind}_id:token,brand:token", [f"{i},x" for i in ids]
    )
    return {"load_col": {**LOAD, kind: [f"{kind}_id", "brand"]}}


@pytest.mark.parametrize(
    ("kind", "ids", "left"), [("item", ["i1", "i2", "i3"], 9), ("user", ["a", "b"], 14)]
)
def test_events_without_a_line_about_user_or_item_are_counted(
    make_config: Any, data_path: Path, caplog: Any, kind: str, ids: list[str], left: int
) -> None:
    """They were left out in silence."""
    loaded = lines_about(data_path / "toy" / "toy.inter", kind, ids)
    assert create_dataset(make_config(**loaded)).statistics.actions == left
    line = (
        f"toy: {30 - left} of 30 events have {kind}s without a line in toy.{kind} and are left "
        "out (filter_inter_by_user_or_item)"
    )
    assert line in caplog.text
    caplog.clear()
    kept = create_dataset(make_config(**loaded, filter_inter_by_user_or_item=False))
    assert kept.statistics.actions == 30
    assert caplog.text == ""
    wanted = {"val_interval": {"brand": ["y"]}}
    with pytest.raises(UserError, match=rf"toy\.{kind} after val_interval=.* it is empty"):
        create_dataset(make_config(**loaded, **wanted))


@pytest.mark.parametrize(("kind", "first"), [("item", "i1"), ("user", "a")])
def test_ids_that_agree_nowhere_are_named(
    make_config: Any, data_path: Path, kind: str, first: str
) -> None:
    """Nothing but the ids is the cause, and one of each file shows why."""
    loaded = lines_about(data_path / "toy" / "toy.inter", kind, ["0.0", "1.0"])
    with pytest.raises(UserError) as caught:
        create_dataset(make_config(**loaded))
    message = str(caught.value)
    assert f"no event has its {kind} in toy.{kind}." in message
    assert f"The first {kind}_id of the events is '{first}', there it is '0.0';" in message
    assert "interval" not in message


def test_sequence_cells_are_cut_to_seq_len(make_config: Any, with_holes: Path) -> None:
    config = make_config(
        dataset="holes",
        load_col={**LOAD, "item": ["item_id", "genre"]},
        seq_len={"genre": 1},
        k_noise=1,
    )
    dataset = create_dataset(config)
    dataset.build()
    item = dataset.get_item_feature()
    row = raw(dataset, "item_id", item["item_id"]).index("i1")
    assert raw(dataset, "genre", item["genre"][row]) == ["x"]


@pytest.fixture
def with_numbers(data_path: Path) -> Path:
    """toy.item with two sequences of numbers and a brand; toy.ent with ids of its own."""
    rows = ["i1,b0,1 3", "i2,b1,5", "i3,b0,", "i4,b1,2 2 9"]
    rows += [f"i{k},b0,1" for k in range(5, 13)]
    header = "item_id:token,brand:token,emb:float_seq"
    write_atomic(data_path / "toy/toy.item", header, rows)
    write_atomic(data_path / "toy/toy.ent", "ent_id:token,price:float", ["x,1", "y,3", "z,2"])
    return data_path


WITH_ITEMS = {"load_col": LOAD | {"item": ["item_id", "brand", "emb"]}}


def item_column(config: Any, field: str) -> dict[str, list[Any]]:
    """Raw item id -> its values of a column of items."""
    dataset = create_dataset(config)
    train = dataset.build()[0]
    names = dataset.field2id_token["item_id"]
    return dict(zip(names, train.item_feat[field].tolist(), strict=True))


def test_sequences_of_numbers_are_normalised(make_config: Any, with_numbers: Path) -> None:
    """From the least of all cells, 1, to the greatest, 9."""
    found = item_column(make_config("SASRec", normalize_field=["emb"], **WITH_ITEMS), "emb")
    assert found["i1"] == [0, 0.25, 0]  # padded to three
    assert found["i4"] == [0.125, 0.125, 1]
    assert found["i3"] == [0, 0, 0]  # an empty cell


def test_sequences_of_numbers_become_features(make_config: Any, with_numbers: Path) -> None:
    """Pairs of a weight and a row of the embedding table; row 0 is padding."""
    found = item_column(make_config("SASRec", numerical_features=["emb"], **WITH_ITEMS), "emb")
    assert found["i4"] == [[2, 1], [2, 1], [9, 1]]
    assert found["i1"] == [[1, 1], [3, 1], [0, 0]]
    assert found["i3"] == [[0, 0]] * 3


@pytest.mark.parametrize(
    ("how", "rows", "number"),
    [
        ({"method": "ED", "bucket": 4}, {1: 1, 2: 1, 3: 1, 5: 2, 9: 4}, 5),  # width 2 and a little
        ({"method": "LD"}, {1: 0, 2: 1, 3: 1, 5: 2, 9: 3}, 4),  # floor(ln(x)^2 + 1) over 2
    ],
)
def test_sequences_of_numbers_are_put_into_buckets(
    make_config: Any, with_numbers: Path, how: dict[str, Any], rows: dict[int, int], number: int
) -> None:
    values = {"numerical_features": ["emb"], "discretization": {"emb": how}}
    config = make_config("SASRec", **values, **WITH_ITEMS)
    found = item_column(config, "emb")
    assert found["i4"] == [[1, rows[2]], [1, rows[2]], [1, rows[9]]]
    assert found["i1"][:2] == [[1, rows[1]], [1, rows[3]]]
    assert found["i2"][0] == [1, rows[5]]
    assert create_dataset(config).num("emb") == number


def test_single_numbers_are_scaled_and_put_into_buckets_as_in_recbole(
    make_config: Any, with_numbers: Path
) -> None:
    """Columns of one number a cell never failed; RecBole's own methods give the right values."""

    class RecBoleNumbers(RecBoleRows):
        _normalize, _discretization = (
            SequentialDataset._normalize,
            SequentialDataset._discretization,
        )

    for values in (
        {"normalize_field": ["timestamp"]},
        {"numerical_features": ["timestamp"]},
        {
            "numerical_features": ["timestamp"],
            "discretization": {"timestamp": {"method": "ED", "bucket": 3}},
        },
        {"numerical_features": ["timestamp"], "discretization": {"timestamp": {"method": "LD"}}},
    ):
        config = make_config("SASRec", **values)
        ours, theirs = RecBoleRows(config), RecBoleNumbers(config)
        assert [list(np.atleast_1d(v)) for v in ours.inter_feat["timestamp"]] == [
            list(np.atleast_1d(v)) for v in theirs.inter_feat["timestamp"]
        ]
        assert ours.num("timestamp") == theirs.num("timestamp")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"numerical_features": ["price"]},
            r"numerical_features=\['price'\]: the column 'price' is",
        ),
        ({"numerical_features": ["brand"]}, "brand is token; only columns of float and float_seq"),
        ({"normalize_field": ["brand"]}, "brand is token; only columns of float and float_seq"),
        ({"normalize_field": ["emd"]}, "'emd' is not loaded; did you mean emb.* load_col="),
        ({"discretization": {"emb": {"method": "LD"}}}, "emb must be among numerical_features="),
        (
            {"val_interval": {"rating": "[3,inf)"}},
            r"column 'rating' is not loaded. load_col=\{'int",
        ),
        ({"unused_col": {"user": ["age"]}}, r"no column of .user is loaded; load_col="),
    ],
)
def test_columns_that_settings_name_must_be_there(
    make_config: Any, with_numbers: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create_loaders(
            config := make_config("SASRec", **WITH_ITEMS, **values), create_dataset(config)
        )


def test_a_label_of_a_column_that_is_not_loaded(make_config: Any, with_numbers: Path) -> None:
    with pytest.raises(UserError, match=r"threshold=.* 'rating' is not loaded.* load_col="):
        create_dataset(make_config("DIN", threshold={"rating": 3}, **WITH_ITEMS))


def test_additional_files_have_ids_of_their_own(make_config: Any, with_numbers: Path) -> None:
    """Without an alias RecBole leaves them text, of which no tensor can be made."""
    values = {"additional_feat_suffix": ["ent"], "load_col": LOAD | {"ent": ["ent_id", "price"]}}
    dataset = create_dataset(make_config("SASRec", **values))
    assert dataset.item_num == 13
    train = dataset.build()[0]
    assert train.ent_feat["ent_id"].tolist() == [1, 2, 3]
    assert dataset.field2id_token["ent_id"].tolist() == ["[PAD]", "x", "y", "z"]
    shared = create_dataset(make_config("SASRec", alias_of_item_id=["ent_id"], **values))
    assert shared.item_num == 16  # with an alias they are items, as before


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ({"ITEM_LIST_LENGTH_FIELD": "item_id"}, "item_id"),
        ({"ITEM_LIST_LENGTH_FIELD": "user_id"}, "user_id"),
        ({"ITEM_LIST_LENGTH_FIELD": "timestamp"}, "timestamp"),
        ({"NEG_PREFIX": "user_", "ITEM_ID_FIELD": "id", "USER_ID_FIELD": "user_id"}, "user_id"),
        ({"LIST_SUFFIX": "p", "TIME_FIELD": "timestam", "RENAME": True}, "timestamp"),
    ],
)
def test_columns_of_the_file_are_not_written_over(
    make_config: Any, data_path: Path, values: dict[str, Any], column: str
) -> None:
    path, values = data_path / "toy/toy.inter", dict(values)
    if "ITEM_ID_FIELD" in values:
        path.write_text(path.read_text().replace("item_id", "id"))
        values["load_col"] = {"inter": ["user_id", "id", "timestamp"]}
    if values.pop("RENAME", False):
        header, *lines = path.read_text().splitlines()
        lines = [header.replace("timestamp:", "timestam:") + "\ttimestamp:float"] + [
            f"{line}\t0" for line in lines
        ]
        path.write_text("\n".join(lines) + "\n")
        values["load_col"] = {"inter": ["user_id", "item_id", "timestam", "timestamp"]}
    config = make_config("SASRec", **values)
    with pytest.raises(UserError, match=f"the column '{column}' would be written over: "):
        create_loaders(config, create_dataset(config))


def test_ids_that_look_like_missing_values_stay_ids(make_config: Any, data_path: Path) -> None:
    sequences = {
        "NA": ["NA", "None", "null", "nan", '"x', "NULL"],
        "None": ["None", "n/a", "NA", "null"],
    }
    write_inter(data_path, "odd", sequences)
    dataset = create_dataset(make_config(dataset="odd", train_sampling="prefix_last"))
    test = dataset.build()[2]
    assert {user: [*history, target] for user, history, target in readable(test)} == {
        "NA": ["None", "null", "nan", '"x', "NULL"],  # the newest four, and the target
        "None": ["None", "n/a", "NA", "null"],
    }
    assert str(dataset.statistics).startswith("2 users, 7 items, 10 actions")


def test_removing_duplicates_keeps_the_order_of_equal_times(
    make_config: Any, data_path: Path
) -> None:
    """Days as times: RecBole's unstable sort shuffles what happened on one day."""
    lines = [(f"u{k % 2}", f"i{k * 7 % 60}", k * 37 % 3) for k in range(200)]
    times = np.array([time for _, _, time in lines], dtype=float)
    by_time = times.argsort(kind="stable")
    assert (times.argsort() != by_time).any()  # what RecBole's sort would do
    expected: dict[str, list[str]] = {"u0": [], "u1": []}
    for user, item, _ in (lines[k] for k in by_time):
        if item not in expected[user]:
            expected[user].append(item)
    rows = [f"{user},{item},{time}" for user, item, time in lines]
    write_atomic(
        data_path / "days" / "days.inter", "user_id:token,item_id:token,timestamp:float", rows
    )
    config = make_config(dataset="days", rm_dup_inter="first", MAX_ITEM_LIST_LENGTH=100)
    dataset = create_dataset(config)
    test = dataset.build()[2]
    assert {user: [*history, target] for user, history, target in readable(test)} == expected
    assert dataset.statistics.actions == sum(map(len, expected.values()))


def test_arrays_are_copied_before_torch_may_write_to_them(make_config: Any) -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            create_dataset(make_config()).build()
    finally:
        torch.set_warn_always(False)
    assert [str(w.message) for w in caught if "writable" in str(w.message)] == []


@pytest.fixture
def benchmark(data_path: Path) -> dict[str, Any]:
    """Pre-split sequences in three files; the configuration that reads them."""
    header = "user_id:token,item_id_list:token_seq,item_id:token"
    files = {
        "train": ["u1,i1,i2", "u1,i1 i2,i3", "u2,i4 i5,i1"],
        "valid": ["u1,i1 i2 i3,i4", "u2,i4 i5 i1,i2"],
        "test": ["u1,i1 i2 i3 i4,i5", "u2,i5 i1 i2,i3"],
    }
    for name, rows in files.items():
        write_atomic(data_path / "split" / f"split.{name}.inter", header, rows)
    return {
        "dataset": "split",
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "alias_of_item_id": ["item_id_list"],
        "benchmark_filename": ["train", "valid", "test"],
        "train_sampling": "prefix_last",
    }


@pytest.mark.parametrize("model", ["SimDiffRec", "SASRec"])
def test_benchmark_files_load_train_and_evaluate(
    build: Any, benchmark: dict[str, Any], tmp_path: Path, model: str
) -> None:
    config, train, valid, test, network = build(model, **benchmark)
    assert readable(train._dataset) == [
        ("u1", ["i1"], "i2"),
        ("u1", ["i1", "i2"], "i3"),
        ("u2", ["i4", "i5"], "i1"),
    ]
    assert readable(valid._dataset)[0] == ("u1", ["i1", "i2", "i3"], "i4")
    assert readable(test._dataset)[1] == ("u2", ["i5", "i1", "i2"], "i3")
    batches = list(train)
    assert sum(map(len, batches)) == 3
    losses = network.calculate_loss(batches[0])
    assert torch.isfinite(sum(losses) if isinstance(losses, tuple) else losses)
    result = PlanTrainer(config, network, tmp_path).evaluator.evaluate(test)
    assert result[KEPT]["hit@5"] == 1.0  # there are five items


def test_benchmark_files_cannot_give_whole_histories(
    make_config: Any, benchmark: dict[str, Any]
) -> None:
    config = make_config(**benchmark | {"train_sampling": "user_all"})
    with pytest.raises(UserError, match="user_all needs one interaction a line; benchmark_filen"):
        create_dataset(config).build()


@pytest.mark.parametrize("item", ["item_id", "product"])
def test_histories_and_targets_of_ready_made_prefixes_share_their_numbers(
    make_config: Any, benchmark: dict[str, Any], data_path: Path, item: str
) -> None:
    """Without being told; also of an item that is never a target, and of other columns."""
    files = {
        "train": ["u1,i1 i9,i2,x y,z", "u2,i4,i1,z,y"],
        "valid": ["u1,i1 i2 i3,i4,x,x"],
        "test": ["u2,i5 i1,i3,y,x"],
    }
    fields = [f"{item}_list", item, "shop_list", "shop"]
    header = "user_id:token,{}:token_seq,{}:token,{}:token_seq,{}:token".format(*fields)
    for name, rows in files.items():
        write_atomic(data_path / "split" / f"split.{name}.inter", header, rows)
    values = benchmark | {"alias_of_item_id": None, "ITEM_ID_FIELD": item}
    columns = {"inter": ["user_id", *fields]}
    dataset = create_dataset(make_config(**values | {"load_col": columns}))
    numbers = dataset.field2token_id
    assert numbers[item] == numbers[f"{item}_list"]
    assert set(numbers[item]) == {"[PAD]", *(f"i{k}" for k in (1, 2, 3, 4, 5, 9))}
    assert numbers["shop"] == numbers["shop_list"]
    assert set(numbers["shop"]) == {"[PAD]", "x", "y", "z"}
    assert dataset.item_num == 7
    train = dataset.build()[0]
    assert [raw(train, item, row[row > 0]) for row in train.inter_feat[f"{item}_list"]] == [
        ["i1", "i9"],
        ["i4"],
    ]
    assert raw(train, item, train.inter_feat[item]) == ["i2", "i1"]
    told = create_dataset(
        make_config(**values | {"load_col": columns, "alias_of_item_id": [f"{item}_list"]})
    )
    assert told.field2token_id == numbers


def test_ready_made_prefixes_are_counted_as_such(
    make_config: Any, benchmark: dict[str, Any]
) -> None:
    """Their number says nothing about the length of histories."""
    dataset = create_dataset(make_config(**benchmark))
    line = "2 users, 5 items, 7 ready-made prefixes"
    assert str(dataset.statistics) == str(dataset.build()[1].statistics) == line


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("benchmark_filename", ["train", "test"], "must name three files: training, validation an"),
        ("benchmark_filename", "train", "must be a list of names"),
        ("alias_of_item_id", ["item_list"], r"\['item_list'\].*: user_id, item_id_list, item_id"),
        ("alias_of_item_id", "item_id_list", "must be a list of names"),
        ("alias_of_user_id", ["item_id_list"], "item_id_list cannot be users and items at once"),
        ("load_col", {"inter": ["user_id", "item_id"]}, "item_id_list:token_seq, is not loaded"),
    ],
)
def test_what_ready_made_prefixes_lack_is_named(
    make_config: Any, benchmark: dict[str, Any], key: str, value: Any, message: str
) -> None:
    values = benchmark | {"alias_of_item_id": None}
    with pytest.raises(UserError, match=message if key == "load_col" else f"{key}=.*{message}"):
        create_dataset(make_config(**values | {key: value}))


def test_ready_made_prefixes_without_a_part_are_left_out(
    make_config: Any, benchmark: dict[str, Any], data_path: Path, caplog: Any
) -> None:
    """Of the file that they are in; padding is no target. A file may be a header alone."""
    folder = data_path / "split"
    header = "user_id:token,item_id_list:token_seq,item_id:token"
    rows = ["u1,i1,i2", "u1,,i3", ",i1,i2", "u2,i4 i5,", "u2,i4,i1"]
    write_atomic(folder / "split.train.inter", header, rows)
    write_atomic(folder / "split.valid.inter", header, [])
    train, valid, test = create_dataset(make_config(**benchmark)).build()
    assert readable(train) == [("u1", ["i1"], "i2"), ("u2", ["i4"], "i1")]
    assert len(valid) == 0
    assert readable(test)[0] == ("u1", ["i1", "i2", "i3", "i4"], "i5")
    assert "3 of 7 ready-made prefixes have no user_id, no item_id or no item_id_lis" in caplog.text


@pytest.mark.parametrize("model", ["Caser", "DIN", "FOSSIL", "HGN", "RepeatNet", "SINE"])
def test_ready_made_prefixes_are_as_wide_as_models_expect(
    build: Any, benchmark: dict[str, Any], model: str
) -> None:
    _, train, _, _, network = build(model, **benchmark | {"MAX_ITEM_LIST_LENGTH": 9})
    batch = next(iter(train))
    assert batch["item_id_list"].shape[1] == 9
    assert batch["item_length"].max() <= 2
    assert torch.isfinite(network.calculate_loss(batch))


def test_a_missing_benchmark_file_is_named(make_config: Any, benchmark: dict[str, Any]) -> None:
    config = make_config(**benchmark | {"benchmark_filename": ["train", "valid", "gone"]})
    with pytest.raises(UserError, match=r"split\.gone\.inter does not exist.*--data_path"):
        create_dataset(config)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickled_data_set_in_the_output_folder_is_never_opened(
    make_config: Any, tmp_path: Path
) -> None:
    """RecBole reads such a file whenever it exists, and would honour its old split."""
    marker, saved = tmp_path / "exploded", tmp_path / "saved"
    saved.mkdir()
    bomb = pickle.dumps(_Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists()  # the bomb works
    marker.unlink()
    for name in ("FlatDataset", "SequentialDataset", "Dataset", "for-SimDiffRec-dataloader"):
        (saved / f"toy-{name}.pth").write_bytes(bomb)
    split = {"split": {"RS": [0.5, 0.25, 0.25]}, "order": "TO", "group_by": "user"}
    config = make_config(eval_args=split, train_sampling="prefix_last")
    parts = create_dataset(config).build()
    create_loaders(config, create_dataset(config))
    assert not marker.exists()
    # "a" has 8 rows: 4, 2 and 2 of them, where leave-one-out would give 6, 1 and 1.
    assert [sum(user == "a" for user, _, _ in readable(part)) for part in parts] == [4, 2, 2]


# ---------------------------------------------------------------- finding and downloading files


@pytest.fixture
def known_name(make_config: Any) -> Any:
    """Config of a data set that RecBole can download."""
    return make_config(
        dataset="amazon-beauty",
        user_inter_num_interval="[0,inf)",
        item_inter_num_interval="[0,inf)",
        MAX_ITEM_LIST_LENGTH=4,
    )


def test_first_download_needs_no_process_group(
    known_name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, folder: str) -> str:
        assert url.endswith("Amazon_Beauty.zip")
        source = write_inter(tmp_path / "remote", "Amazon_Beauty", SEQUENCES)
        with zipfile.ZipFile(Path(folder) / "Amazon_Beauty.zip", "w") as archive:
            archive.write(source, source.name)
        return str(Path(folder) / "Amazon_Beauty.zip")

    monkeypatch.setattr(recbole_dataset, "decide_download", lambda url: True)
    monkeypatch.setattr(recbole_dataset, "download_url", download)
    dataset = create_dataset(known_name)
    assert dataset.build()[2].statistics.actions == 30
    assert [path.name for path in Path(known_name["data_path"]).iterdir()] == [
        "amazon-beauty.inter"
    ]


def test_a_failed_download_says_what_to_do(
    known_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(url: str) -> bool:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(recbole_dataset, "decide_download", offline)
    with pytest.raises(UserError) as caught:
        create_dataset(known_name)
    message = str(caught.value)
    assert f"{known_name['data_path']}/amazon-beauty.inter does not exist" in message
    assert "Amazon_Beauty.zip failed" in message
    assert "no route to host" in message
    assert "Fetch it by hand, unpack it there, or set --data_path" in message


def test_an_unknown_data_set_names_the_place_searched(make_config: Any, data_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        create_dataset(make_config(dataset="no-such-data"))
    message = str(caught.value)
    assert f"{data_path}/no-such-data/no-such-data.inter does not exist" in message
    assert "--data_path at the folder that holds no-such-data/no-such-data.inter" in message


def test_a_folder_without_the_file_names_it(make_config: Any, data_path: Path) -> None:
    (data_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/empty\.inter does not exist.*--data_path"):
        create_dataset(make_config(dataset="empty"))


def test_a_missing_column_is_named_with_those_there_are(make_config: Any) -> None:
    columns = ["user_id", "item_id", "timestamp", "rating"]
    with pytest.raises(UserError, match=r"has no column rating; it has user_id:token.*load_col"):
        create_dataset(make_config(load_col={"inter": columns}))


def test_a_file_of_users_items_and_times_needs_no_settings(tmp_path: Path) -> None:
    write_inter(tmp_path, "few", SEQUENCES)
    found = create_dataset(Config("SimDiffRec", "few", overrides={"data_path": str(tmp_path)}))
    assert found.statistics.actions == sum(map(len, SEQUENCES.values()))
    test = readable(create_loaders(found.config, found)[2]._dataset)
    assert [(user, target) for user, _, target in test] == [
        (user, items[-1]) for user, items in SEQUENCES.items() if len(items) > 2
    ]


def test_a_file_without_times_says_what_to_do(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "few" / "few.inter", "user_id:token,item_id:token", ["u,i"])
    with pytest.raises(UserError) as caught:
        create_dataset(Config("SimDiffRec", "few", overrides={"data_path": str(tmp_path)}))
    assert str(caught.value) == (
        f"{path} has no column timestamp; it has user_id:token, item_id:token. TIME_FIELD names "
        "the column of times, which order the events. A file without times needs one, such as the "
        "number of the line as timestamp:float"
    )


@pytest.mark.parametrize("columns", [{}, {"inter": []}, {"inter": ["user_id", "timestamp"]}])
def test_users_and_items_must_be_loaded(make_config: Any, columns: Any) -> None:
    with pytest.raises(UserError, match=r"load_col=.* must have user_id and item_id under inter"):
        create_dataset(make_config(load_col=columns))


@pytest.mark.parametrize(("name", "near"), [("amazon_beauty", "amazon-beauty"), ("toyy", "toy")])
def test_an_unknown_data_set_is_answered_with_the_nearest_name(
    make_config: Any, name: str, near: str
) -> None:
    """Of those with settings here and those in ``data_path``."""
    with pytest.raises(UserError, match=f"dataset='{name}' is not there.* Did you mean {near}\\?"):
        create_dataset(make_config(dataset=name))


def test_a_missing_time_column_is_named(make_config: Any) -> None:
    config = make_config(load_col={"inter": ["user_id", "item_id"]})
    with pytest.raises(UserError, match=r"time column 'timestamp' is not loaded.*TIME_FIELD.*load"):
        create_loaders(config, create_dataset(config))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user_id:token,item_id,timestamp:float", "column 'item_id' must be 'name:type'"),
        ("user_id:token,item_id:str,timestamp:float", "column 'item_id:str' must be 'name:type'"),
        (
            "user_id:token,item_id:token,timestamp:float",
            "bad.inter, line 2: timestamp:float='yesterday' is not a number",
        ),
        (
            "user_id:token,item_id:token,timestamp:float_seq",
            "bad.inter, line 2: timestamp:float_seq='yesterday' is not a number",
        ),
        ("user_id:token,item_id:token,item_id:token", "line 1: 2 columns are named 'item_id'"),
        (
            "user_id:token,timestamp:float,timestamp:token",
            r"line 1: 2 columns are named 'timestamp' \(timestamp:float, timestamp:token\)",
        ),
        ("user_id:token,item_id:float,timestamp:float", "holds ids; it must be item_id:token"),
        ("uid:token,item_id:token,timestamp:float", "has no column user_id; .* USER_ID_FIELD and"),
        ("user_id:token;item_id:token", r"separated by field_separator='\\t'"),
    ],
)
def test_unreadable_files_are_named(
    make_config: Any, data_path: Path, header: str, message: str
) -> None:
    path = write_atomic(data_path / "bad" / "bad.inter", header, ["u1,i1,yesterday"])
    with pytest.raises(UserError, match=message) as caught:
        create_dataset(make_config(dataset="bad"))
    assert str(path) in str(caught.value)


def test_a_header_of_megabytes_is_not_printed_whole(make_config: Any, data_path: Path) -> None:
    path = data_path / "toy/toy.inter"
    path.write_text("x" * 10_000_000 + "\n1\n")
    with pytest.raises(
        UserError, match=r"toy.inter: column 'xxx.* \.\.\. .*field_separator"
    ) as error:
        create_dataset(make_config("SASRec"))
    assert len(str(error.value)) < 2_100


def test_filters_that_leave_nothing_are_named(make_config: Any, data_path: Path) -> None:
    """And no others: the default leaves out nothing."""
    config = make_config(user_inter_num_interval="[99,inf)")
    message = (
        r"dataset='toy' \(.*toy\) has no interactions, or user_inter_num_interval=\[99,inf\) leave"
    )
    with pytest.raises(UserError, match=message):
        create_dataset(config)
    write_atomic(data_path / "none" / "none.inter", HEADER, [])
    with pytest.raises(UserError, match=r"dataset='none' \(.*none\) has no interactions$"):
        create_dataset(make_config(dataset="none"))


def test_models_with_a_data_set_class_of_their_own_are_refused(make_config: Any) -> None:
    with pytest.raises(UserError, match="model=DIEN needs RecBole's DIENDataset"):
        create_dataset(make_config("DIEN"))


# ---------------------------------------------------------------- what a data set tells


def test_statistics_line(make_config: Any) -> None:
    dataset = create_dataset(make_config())
    parts = dataset.build()
    line = "6 users, 12 items, 30 actions, average length 5.00, sparsity 58.33%"
    assert str(dataset.statistics) == line
    assert str(parts[1].statistics) == line  # the whole data set's, whichever part is asked


def test_sparsity_counts_a_repeated_pair_once(make_config: Any, data_path: Path) -> None:
    """Of 2 x 3 pairs four occur; seven actions would be more than there are pairs."""
    write_inter(data_path, "again", {"a": ["x", "y", "x", "x"], "b": ["y", "z", "y"]})
    dataset = create_dataset(make_config(dataset="again", k_noise=1))
    line = "2 users, 3 items, 7 actions, average length 3.50, sparsity 33.33%"
    assert str(dataset.statistics) == line
    assert [str(part.statistics) for part in dataset.build()] == [line] * 3
    assert dataset.statistics == Statistics(2, 3, 7)


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
def test_item_counter_counts_every_training_target(
    make_config: Any, data_path: Path, style: str
) -> None:
    write_inter(data_path, "long", LONG)
    train = create_dataset(make_config(dataset="long", train_sampling=style)).build()[0]
    expected = Counter(LONG["a"][1:-2] + LONG["b"][1:-2] + LONG["c"][1:-2] + ["i2", "i6"])
    found = {raw(train, "item_id", [item])[0]: n for item, n in train.item_counter.items()}
    assert found == expected


def test_item_titles(make_config: Any, data_path: Path) -> None:
    assert create_dataset(make_config()).item_titles() == {}
    dataset = create_dataset(make_config(item_title_field="title"))
    with pytest.raises(UserError, match=r"item_title_field='title' needs .*toy\.item, which does"):
        dataset.item_titles()
    write_atomic(
        data_path / "toy" / "toy.item",
        "item_id:token,title:token_seq,year:float",
        ['i1,The "First" One,1990', "i2,None,", "i3,,1992"],
    )
    assert dataset.item_titles() == {"i1": 'The "First" One', "i2": "None", "i3": ""}
    dataset = create_dataset(make_config(item_title_field="name"))
    with pytest.raises(UserError, match="no column 'name'; it has item_id, title, year"):
        dataset.item_titles()


def test_five_core_of_the_amazon_settings(make_config: Any, data_path: Path) -> None:
    """Rare users and items go in rounds until none is left, after duplicates went."""
    pairs = [(f"u{u}", f"i{i}") for u in range(6) for i in range(6)]
    pairs += [("u0", "i0"), ("u0", "i1")]  # duplicates
    pairs += [("dup", "i0")] * 3 + [("dup", f"i{i}") for i in (1, 2, 3)]  # 6 lines, 4 items
    pairs += [("few", f"i{i}") for i in range(4)]
    pairs += [(f"u{u}", "rare") for u in range(3)]
    # "chain" has five items, but one of them is "link", which only four others have.
    pairs += [("chain", item) for item in ("i0", "i1", "i2", "i3", "link")]
    pairs += [(f"u{u}", "link") for u in range(3)]
    rows = [f"{user},{item},{k}" for k, (user, item) in enumerate(pairs)]
    write_atomic(
        data_path / "raw" / "raw.inter", "user_id:token,item_id:token,timestamp:float", rows
    )
    settings = read_yaml(properties_dir() / "dataset" / "amazon-beauty.yaml")
    dataset = create_dataset(make_config(dataset="raw", **settings))
    dataset.build()
    kept = list(
        zip(
            raw(dataset, "user_id", dataset.flat["user_id"]),
            raw(dataset, "item_id", dataset.flat["item_id"]),
            strict=True,
        )
    )
    assert sorted(kept) == sorted({(f"u{u}", f"i{i}") for u in range(6) for i in range(6)})
    assert min(Counter(user for user, _ in kept).values()) >= 5
    assert min(Counter(item for _, item in kept).values()) >= 5
    first = [item for user, item in kept if user == "u0"]
    assert first == [f"i{i}" for i in range(6)]  # the first of the duplicates stayed


def test_sampled_evaluation_still_works(build: Any, tmp_path: Path) -> None:
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
    results = {}
    for mode in ("full", "uni2"):
        config, _, valid, test, model = build(eval_args={**split, "mode": mode})
        trainer = PlanTrainer(config, model, tmp_path)
        results[mode] = [trainer.evaluator.evaluate(part) for part in (valid, test)]
    for result in results["uni2"]:
        assert list(result) == [KEPT]
        assert result[KEPT]["hit@5"] == 1.0  # the target and two others are ranked
        assert result[KEPT]["mrr@5"] >= 1 / 3
    assert min(result[KEPT]["hit@5"] for result in results["full"]) < 1.0  # all 12 are
    # DiffuASR T32: nobody's rank is worse among fewer.
    for few, every in zip(results["uni2"], results["full"], strict=True):
        assert all(value >= every[KEPT][name] for name, value in few[KEPT].items())


def test_a_time_column_that_is_not_a_number_is_refused(make_config: Any, data_path: Path) -> None:
    """As tokens, times would be put in the order in which they appear in the file."""
    path = data_path / "toy" / "toy.inter"
    path.write_text(path.read_text().replace("timestamp:float", "timestamp:token"))
    config = make_config()
    dataset = create_dataset(config)
    with pytest.raises(UserError, match="'timestamp' is declared token; it must be float"):
        create_loaders(config, dataset)


def test_data_without_anything_to_evaluate_are_refused(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "toy", {user: ["i1", "i2"] for user in "abc"})
    config = make_config(k_noise=1)
    with pytest.raises(UserError, match="no user has enough interactions for validation or test"):
        create_loaders(config, create_dataset(config))


# One user has all six items, the others four each.
FEW = {"u1": [*"abcdefabc"]} | {f"u{n}": [*"abcdefabc"[n % 6 :][:4]] for n in range(2, 12)}


@pytest.mark.parametrize(
    ("model", "longest", "changes"),
    [
        ("BERT4Rec", 5, {}),
        ("CaDiRec", 4, {}),
        ("CaDiRec", 4, {"train_sampling": "prefix_last"}),
        ("CL4SRec", 4, {"sr_loss": "BCE"}),
    ],
)
def test_rows_that_leave_no_negative_are_refused(
    make_config: Any, data_path: Path, model: str, longest: int, changes: dict[str, Any]
) -> None:
    """One would be sought for ever. A mask may draw the target, BCE may not."""
    write_inter(data_path, "few", FEW)

    def loaders(**more: Any) -> Any:
        config = make_config(model, "few", **changes, **more)
        return create_loaders(config, create_dataset(config))

    for length in (longest + 1, 20):
        message = f"MAX_ITEM_LIST_LENGTH={length} a row of user 'u1' holds all 6 items"
        with pytest.raises(UserError, match=message):
            loaders(MAX_ITEM_LIST_LENGTH=length)
    for loader in loaders(MAX_ITEM_LIST_LENGTH=longest):
        assert len(next(iter(loader))) > 0
    # However long rows may be, nobody has all items here.
    write_inter(data_path, "few", FEW | {"u1": [*"abcdeabcd"]})
    for loader in loaders(MAX_ITEM_LIST_LENGTH=20):
        assert len(next(iter(loader))) > 0


def test_negatives_outside_a_row_of_all_items_but_one(build: Any, data_path: Path) -> None:
    """Nine rows of a user hold five of six items; the sixth is the only negative."""
    write_inter(data_path, "few", FEW | {"u1": [*"abcdeabcdeaf"]})
    _, train, _, _, model = build("CaDiRec", "few", MAX_ITEM_LIST_LENGTH=20, cand_topk=2)
    f = train.dataset.field2token_id["item_id"]["f"]
    for batch in train:
        long = batch["item_length"] > 5
        drawn = model.sample_negatives(batch["item_id_list"], batch["item_id"], None)
        assert (drawn[long] == f).all()


def test_invented_items_count_among_those_of_a_row(data_path: Path) -> None:
    write_inter(data_path, "long", FEW | {"u1": [*"abcdeabcd"]})
    config = augmented(data_path, "BERT4Rec", MAX_ITEM_LIST_LENGTH=20)
    dataset = create_dataset(config)
    pseudo = torch.zeros(dataset.user_num, 3, dtype=torch.long)
    create_loaders(config, dataset, pseudo)
    pseudo[dataset.field2token_id["user_id"]["u1"]] = dataset.field2token_id["item_id"]["f"]
    with pytest.raises(UserError, match="a row of user 'u1' holds all 6 items"):
        create_loaders(config, create_dataset(config), pseudo)


@pytest.mark.parametrize("mode", ["full", "uni1", "pop1"])
def test_one_item_leaves_no_negative(make_config: Any, data_path: Path, mode: str) -> None:
    """The only item of a data set, or the only target, where items are drawn by popularity."""
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}

    def load(model: str, first: str) -> Any:
        write_inter(data_path, "one", {user: [first, "i", "i", "i"] for user in "ab"})
        values = {"topk": [1], "valid_metric": "NDCG@1", "eval_args": split}
        config = make_config(model, "one", **values)
        return create_loaders(config, create_dataset(config))

    with pytest.raises(UserError, match="has one item to draw negatives from, which is the target"):
        load("FPMC", "i")
    assert len(load("FPMC", "j")[0]) == 1 if mode != "pop1" else True
    if mode == "full":
        assert len(load("SASRec", "i")[0]) == 1  # draws nothing
    elif mode == "pop1":
        with pytest.raises(UserError, match="has one item to draw negatives from"):
            load("SASRec", "j")


# ---------------------------------------------------------------- training items of each user


SPLITS = {
    "leave one out": {"split": {"LS": "valid_and_test"}, "group_by": "user"},
    "test only": {"split": {"LS": "test_only"}, "group_by": "user"},
    "ratio": {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": "user"},
    "ratio by time": {"split": {"RS": [0.7, 0.1, 0.2]}, "group_by": "none"},
}


def by_user(items: torch.Tensor, ends: torch.Tensor) -> list[list[int]]:
    """The items of each user, of user 0 first."""
    return [part.tolist() for part in items.tensor_split(ends.tolist())[:-1]]


@pytest.mark.parametrize("style", ["user_all", "prefix_last"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_training_items_end_with_the_newest_training_target(
    make_config: Any, data_path: Path, split: dict[str, Any], style: str
) -> None:
    """T21: for any split, what RecBole's training rows of a user hold, and nothing after them."""
    write_inter(
        data_path, "long", LONG | {f"n{n}": [f"i{k}" for k in range(n)] for n in range(1, 9)}
    )
    values = {"dataset": "long", "eval_args": split | {"order": "TO", "mode": "full"}}
    rows = RecBoleRows(make_config(**values, train_sampling="prefix_last")).build()[0].inter_feat
    counts = torch.bincount(rows["user_id"], minlength=14)
    dataset = create_dataset(make_config(**values, train_sampling=style))
    train = dataset.build()[0]
    items, ends = train.training_items()
    found = by_user(items, ends)
    assert found[0] == []
    assert len(found) == 14
    names = dataset.field2id_token["user_id"]
    sequences = LONG | {f"n{n}": [f"i{k}" for k in range(n)] for n in range(1, 9)}
    for user in range(1, 14):
        n = int(counts[user])
        expected = sequences[names[user]][: 1 + n] if n else []
        assert raw(dataset, "item_id", found[user]) == expected, names[user]

    # T17: the rest of the array is never looked at.
    columns, place = train.flat, torch.arange(len(dataset.flat["user_id"]))
    first = {u: int(place[dataset.flat["user_id"] == u][0]) for u in range(1, 14)}
    known = {first[u] + k for u in range(1, 14) for k in range(len(found[u]))}
    hidden = torch.tensor([k not in known for k in place.tolist()])
    train.flat = columns | {"item_id": columns["item_id"].masked_fill(hidden, 999)}
    assert torch.equal(train.training_items()[0], items)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_training_items_of_short_histories(make_config: Any, data_path: Path, n: int) -> None:
    """T21: the first two items of 2 or 3, else all but two; of a single one none."""
    sequence = [f"i{k}" for k in range(n)]
    write_inter(data_path, "few", {"other": [f"i{k}" for k in range(9)], "u": sequence})
    train = create_dataset(make_config(dataset="few")).build()[0]
    found = by_user(*train.training_items())
    expected = sequence[: {1: 0, 2: 2, 3: 2}.get(n, n - 2)]
    assert raw(train, "item_id", found[2]) == expected


# ---------------------------------------------------------------- invented items in front of rows


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
def test_rows_with_invented_items(
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


@pytest.mark.parametrize("keep", [True, False], ids=["both", "replace"])
def test_only_real_targets_are_expected(make_config: Any, data_path: Path, keep: bool) -> None:
    """Losses are divided by targets_per_batch: an invented item is a token, but no target."""
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
def test_a_batch_with_invented_items_equals_the_rows(data_path: Path, style: str, mix: str) -> None:
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


def augmented(data_path: Path, backbone: str, **changes: Any) -> Config:
    """DiffuASR's configuration with that backbone, on the data set ``long``."""
    values = SMALL | {"data_path": str(data_path), "MAX_ITEM_LIST_LENGTH": 12}
    known = Config(backbone, "long").final_config_dict
    values = {k: v for k, v in values.items() if k in known}
    values |= {"backbone": backbone, "augmenter": "random"} | changes
    return Config("DiffuASR", "long", overrides=values)


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
def test_negatives_are_drawn_as_without_invented_items(data_path: Path, mix: str) -> None:
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
def test_invented_items_of_nobody_change_no_row(data_path: Path, backbone: str) -> None:
    """T24."""
    write_inter(data_path, "long", LONG)
    config = augmented(data_path, backbone)
    rows = []
    for pseudo in (None, torch.zeros(6, 3, dtype=torch.long)):
        torch.manual_seed(0)
        train = create_loaders(config, create_dataset(config), pseudo)[0]
        rows.append(in_order(train))
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ({"timestamp": "5"}, r"val_interval: timestamp='5' must be an interval such as"),
        ({"timestamp": "[1,2];5"}, "timestamp='.1,2.;5' must be an interval"),
        ({"timestamp": "[,5]"}, "must be an interval"),
        ({"timestamp": ""}, "must be an interval"),
        ({"timestamp": [1, 2, 3]}, "must be an interval"),
        ({"timestamp": None}, "timestamp=None must be an interval"),
        ({"item_id": "i1"}, "item_id='i1' must be a list of values as text"),
        ({"item_id": [1, 2]}, "must be a list of values as text"),
        ({"nowhere": "[1,2]"}, "column 'nowhere' is not loaded.* load_col="),
        ("[1,2]", r"val_interval='\[1,2\]' must be like \{field: "),
    ],
)
def test_what_is_no_interval_is_refused(make_config: Any, intervals: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_dataset(make_config(val_interval=intervals))


@pytest.mark.parametrize(
    ("intervals", "actions"),
    [
        ({"timestamp": "[1,4)"}, 15),
        ({"timestamp": [1, 3]}, 15),
        ({"timestamp": "[0,0];[7,inf)"}, 8),
        ({"item_id": ["i1", "i12"]}, 6),
        (None, 30),
    ],
)
def test_intervals_filter(make_config: Any, intervals: Any, actions: int) -> None:
    assert create_dataset(make_config(val_interval=intervals)).statistics.actions == actions
