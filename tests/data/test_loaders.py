"""Loaders: training batches, sampled rankings, negatives that can be drawn."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import BucketLoader, create_loaders
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.modules.negatives import unseen_items
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import write_inter
from tests.data.toy import augmented

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
        row = torch.arange(len(batch))
        drawn = unseen_items(batch["item_id_list"], batch["item_id"], row, model.n_items)
        assert (drawn[long] == f).all()


def test_pseudo_items_count_among_those_of_a_row(data_path: Path) -> None:
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
