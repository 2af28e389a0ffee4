"""Data sets: RecBole's rows over one flat array, training rows, order of time, and what is told."""

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.data.statistics import Statistics
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.batch import TARGET
from tests.conftest import write_inter
from tests.data.toy import (
    HEADER,
    LONG,
    RecBoleRows,
    RecBoleRowsInExactOrder,
    all_rows,
    raw,
    readable,
    write_atomic,
)


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


def test_a_missing_time_column_is_named(make_config: Any) -> None:
    config = make_config(load_col={"inter": ["user_id", "item_id"]})
    with pytest.raises(UserError, match=r"time column 'timestamp' is not loaded.*TIME_FIELD.*load"):
        create_loaders(config, create_dataset(config))


def test_models_with_a_data_set_class_of_their_own_are_refused(make_config: Any) -> None:
    with pytest.raises(UserError, match="model=DIEN needs RecBole's DIENDataset"):
        create_dataset(make_config("DIEN"))


# ---------------------------------------------------------------- what a data set tells


def test_statistics_line(make_config: Any) -> None:
    dataset = create_dataset(make_config())
    parts = dataset.build()
    line = "6 users, 12 items, 30 actions, average length 5.00, sparsity 58.33%, 0 equal times"
    assert str(dataset.statistics) == line
    assert str(parts[1].statistics) == line  # the whole data set's, whichever part is asked


def test_sparsity_counts_a_repeated_pair_once(make_config: Any, data_path: Path) -> None:
    """Of 2 x 3 pairs four occur; seven actions would be more than there are pairs."""
    write_inter(data_path, "again", {"a": ["x", "y", "x", "x"], "b": ["y", "z", "y"]})
    dataset = create_dataset(make_config(dataset="again", k_noise=1))
    line = "2 users, 3 items, 7 actions, average length 3.50, sparsity 33.33%, 0 equal times"
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


def test_a_time_column_that_is_not_a_number_is_refused(make_config: Any, data_path: Path) -> None:
    """As tokens, times would be put in the order in which they appear in the file."""
    path = data_path / "toy" / "toy.inter"
    path.write_text(path.read_text().replace("timestamp:float", "timestamp:token"))
    config = make_config()
    dataset = create_dataset(config)
    with pytest.raises(UserError, match="'timestamp' is declared token; it must be float"):
        create_loaders(config, dataset)


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


def test_equal_times_within_a_user_are_counted(make_config: Any, data_path: Path) -> None:
    """Also times that one float32 stands for both of: those are not equal."""
    base = 1_500_000_000
    events = [("a", base), ("a", base + 1), ("a", base), ("a", base), ("b", base), ("b", base + 2)]
    lines = [f"{user},i{number},{time}" for number, (user, time) in enumerate(events)]
    write_atomic(data_path / "ties" / "ties.inter", HEADER, lines)
    dataset = create_dataset(make_config(dataset="ties", k_noise=1))
    assert dataset.statistics.ties == 2
    assert [part.statistics.ties for part in dataset.build()] == [2, 2, 2]
    assert str(dataset.statistics).endswith(", 2 equal times")
