"""Recommendations from a checkpoint alone: the model's own scores, in the user's own ids."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_simdiff import load
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import TrainingDiverged, UserError
from recbole_simdiff.pipelines.diffuasr import run_stages
from recbole_simdiff.runs.restore import restore
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.serving.recommender import Recommender
from tests.conftest import SEQUENCES, SMALL, write_inter

ITEMS = {f"i{number}" for number in range(1, 13)}


class Trained(NamedTuple):
    run_dir: Path
    n_items: int
    number: dict[str, int]  # raw item id -> the model's id


def train(folder: Path, dataset: str, **changes: Any) -> Trained:
    """One epoch of a small SimDiffRec in ``folder``."""
    known = Config("SimDiffRec", "toy").final_config_dict
    values = {key: value for key, value in SMALL.items() if key in known}
    values |= {"epochs": 1, "checkpoint_dir": str(folder / "saved")} | changes
    config = Config("SimDiffRec", dataset, overrides=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        items = create_dataset(config).field2token_id["item_id"]
        run_dir = Path(run(config).run_dir)
    return Trained(run_dir, len(items), items)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run on toy whose data set was deleted."""
    folder = tmp_path_factory.mktemp("trained")
    write_inter(folder / "dataset", "toy", SEQUENCES)
    result = train(folder, "toy", data_path=str(folder / "dataset"))
    shutil.rmtree(folder / "dataset")
    return result


@pytest.fixture
def recommender(trained: Trained) -> Recommender:
    return load(trained.run_dir, use_gpu=False)


@pytest.fixture
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_scores(recommender: Recommender, trained: Trained, history: list[str]) -> Tensor:
    """The model asked directly, with a batch made by hand."""
    numbers = [trained.number[item] for item in history][-4:]
    seq = torch.tensor([numbers + [0] * (4 - len(numbers))])
    batch = {"item_id_list": seq, "item_length": torch.tensor([len(numbers)])}
    with torch.no_grad():
        return recommender.model.full_sort_predict(Interaction(batch))[0]


@pytest.mark.parametrize("history", [["i1"], ["i3", "i2", "i9"], SEQUENCES["a"]])
def test_scores_are_the_models_own(
    recommender: Recommender, trained: Trained, history: list[str]
) -> None:
    (found,) = recommender.recommend([history], k=12, exclude_seen=False)
    scores = model_scores(recommender, trained, history)
    assert len(found.items) == 12
    wanted = [scores[trained.number[item]].item() for item in found.items]
    torch.testing.assert_close(found.scores, wanted)
    assert found.scores == sorted(found.scores, reverse=True)
    assert found.scores[0] > found.scores[-1]


def test_a_batch_equals_one_by_one(recommender: Recommender) -> None:
    """Rows of different lengths share a padded batch; eval_batch_size cuts it."""
    histories = [list(items) for items in SEQUENCES.values()]
    recommender.config["eval_batch_size"] = 4
    together = recommender.recommend(histories, k=5)
    for history, found in zip(histories, together, strict=True):
        (alone,) = recommender.recommend([history], k=5)
        assert found.items == alone.items
        torch.testing.assert_close(found.scores, alone.scores)


def test_recommendations_repeat(recommender: Recommender) -> None:
    """Dropout is off."""
    first, second = (recommender.recommend([["i1", "i2"]], k=5) for _ in range(2))
    assert first == second


def test_seen_items_are_left_out_on_request(recommender: Recommender) -> None:
    history = ["i1", "i2", "i3", "i4", "i5", "i6"]  # longer than the model reads
    (dropped,) = recommender.recommend([history], k=12)
    assert set(dropped.items) == ITEMS - set(history)
    (kept,) = recommender.recommend([history], k=12, exclude_seen=False)
    assert set(kept.items) == ITEMS
    assert [item for item in kept.items if item not in history] == dropped.items


def test_k_cuts_the_ranking(recommender: Recommender) -> None:
    (full,) = recommender.recommend([["i1"]], k=11)
    for k in (1, 3):
        (found,) = recommender.recommend([["i1"]], k=k)
        assert found.items == full.items[:k]
        assert found.scores == pytest.approx(full.scores[:k])


def test_a_k_larger_than_the_items_gives_all_of_them(recommender: Recommender) -> None:
    (found,) = recommender.recommend([["i1"]], k=1000)
    assert set(found.items) == ITEMS - {"i1"}
    assert all(abs(score) < 1e9 for score in found.scores)
    (nothing_left,) = recommender.recommend([sorted(ITEMS)], k=5)
    assert nothing_left.items == []


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(recommender: Recommender, k: int) -> None:
    with pytest.raises(UserError, match=rf"k={k} must be at least 1"):
        recommender.recommend([["i1"]], k=k)


@pytest.mark.parametrize("flat", [["i1", "i2"], "i1", [1, 2], [["i1"], "i2"]])
def test_ids_in_place_of_histories_are_refused(recommender: Recommender, flat: Any) -> None:
    """The letters of "i1" would be taken for the items "i" and "1"."""
    with pytest.raises(UserError, match=r"is not a history but an id; .* such as \[\["):
        recommender.recommend(flat)


def test_scores_that_are_no_numbers_are_told(recommender: Recommender) -> None:
    """One item's weights are enough; it is not left out in silence, nor is one of score inf."""
    weight = recommender.model.item_embedding.weight.data
    before = weight[3].clone()
    weight[3] = torch.nan
    with pytest.raises(TrainingDiverged, match="the model's scores contain NaN; nothing can be ra"):
        recommender.recommend([["i1"]])
    weight[3] = before
    stock = recommender.model.full_sort_predict

    def predict(batch: Any) -> Tensor:
        scores: Tensor = stock(batch)
        scores[:, 3] = torch.inf
        return scores

    recommender.model.full_sort_predict = predict
    (found,) = recommender.recommend([["i1"]], k=12)
    assert found.items[0] == recommender.item_ids[3]
    assert set(found.items) == ITEMS - {"i1"}


def test_unknown_items_are_reported_and_left_out(recommender: Recommender) -> None:
    with pytest.warns(UserWarning, match="2 items are not in the training data; left out"):
        (found,) = recommender.recommend([["i1", "nope", "i2", "[PAD]"]], k=3)
    assert found.unknown == ["nope", "[PAD]"]
    (clean,) = recommender.recommend([["i1", "i2"]], k=3)
    assert found.items == clean.items
    assert found.scores == pytest.approx(clean.scores)
    assert clean.unknown == []


@pytest.mark.usefixtures("_quiet")
def test_histories_without_a_known_item_get_nothing(recommender: Recommender) -> None:
    empty, unknown, known = recommender.recommend([[], ["nope"], ["i1"]], k=2)
    assert empty == ([], [], [])
    assert unknown == ([], [], ["nope"])
    assert len(known.items) == 2
    assert recommender.recommend([]) == []


def test_ids_that_are_numbers_are_read_as_text(tmp_path: Path) -> None:
    write_inter(tmp_path / "dataset", "numbers", {u: list("123456") for u in "ab"})
    result = train(tmp_path, "numbers", data_path=str(tmp_path / "dataset"))
    recommender = load(result.run_dir)
    numbers: Any = [1, 2]
    assert recommender.recommend([numbers], k=2) == recommender.recommend([["1", "2"]], k=2)


def test_only_the_newest_items_shape_the_scores(recommender: Recommender) -> None:
    """MAX_ITEM_LIST_LENGTH is 4."""
    newest = ["i6", "i7", "i8", "i9"]
    long, short, turned = recommender.recommend(
        [["i1", "i2", *newest], newest, newest[::-1]], k=12, exclude_seen=False
    )
    assert long.items == short.items
    assert long.scores == pytest.approx(short.scores)
    assert turned.scores != pytest.approx(short.scores)


def test_item_ids_line_up_with_the_rows_of_the_item_table(recommender: Recommender) -> None:
    """Twice the row of an item is twice its score, and nobody else's."""
    table, history = recommender.model.item_embedding.weight, [["i1", "i2"]]
    assert len(table) == len(recommender.item_ids)

    def scores() -> dict[str, float]:
        (found,) = recommender.recommend(history, k=12, exclude_seen=False)
        return dict(zip(found.items, found.scores, strict=True))

    before = scores()
    with torch.no_grad():
        table[recommender.item_ids.index("i7")] *= 2
    after = scores()
    assert after["i7"] == pytest.approx(2 * before["i7"])
    assert {item: after[item] for item in before if item != "i7"} == pytest.approx(
        {item: score for item, score in before.items() if item != "i7"}
    )


def test_users_histories_come_back_whole(recommender: Recommender) -> None:
    """With validation and test item, and longer than the model reads."""
    assert recommender.users == list(SEQUENCES)
    for user, items in SEQUENCES.items():
        assert recommender.history(user) == items


def test_an_unknown_user_is_named(recommender: Recommender) -> None:
    with pytest.raises(UserError, match=r"user 'zoe' is not in the data set 'toy' .*\(6 users\)"):
        recommender.history("zoe")
    with pytest.raises(UserError, match=r"user '\[PAD\]' is not in the data set"):
        recommender.history("[PAD]")


def test_best_and_last_can_be_named(trained: Trained) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        assert len(load(trained.run_dir / name).recommend([["i1"]], k=3)[0].items) == 3


def test_a_folder_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*best\.safetensors; give a run folder"):
        load(tmp_path)


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec", "STAMP"])
def test_recboles_models_recommend_too(tmp_path: Path, model: str) -> None:
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    changes = {"mask_ratio": 0.9, "MAX_ITEM_LIST_LENGTH": 8} if model == "BERT4Rec" else {}
    run_dir = train_known(tmp_path, model, changes)
    shutil.rmtree(tmp_path / "dataset")
    (found,) = load(run_dir, use_gpu=False).recommend([["i1", "i2"]], k=12)
    assert set(found.items) == ITEMS - {"i1", "i2"}


def train_known(folder: Path, model: str, changes: dict[str, Any]) -> Path:
    """One epoch with those of the small settings that the model knows."""
    known = set(Config(model, "ml-100k").final_config_dict)
    values = {k: v for k, v in (SMALL | changes).items() if k in known}
    values |= {
        "epochs": 1,
        "data_path": str(folder / "dataset"),
        "checkpoint_dir": str(folder / "saved"),
    }
    return Path(run(Config(model, "toy", overrides=values)).run_dir)


@pytest.mark.parametrize("model", ["SASRec", "SimDiffRec"])
def test_ready_made_prefixes_are_recommended_to_by_their_own_ids(
    tmp_path: Path, model: str
) -> None:
    """Items are scored as in the evaluation of these rows, those that are never a target, too."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    files = {
        "train": "u1\td b\ta\nu2\te\tb\nu3\ta c\td\nu4\tb\tc",
        "valid": "u5\tc d\ta",
        "test": "u6\td c e\tb",
    }
    (tmp_path / "dataset" / "toy").mkdir(parents=True)
    for name, rows in files.items():
        (tmp_path / "dataset" / "toy" / f"toy.{name}.inter").write_text(header + rows + "\n")
    columns = {"inter": ["user_id", "item_id_list", "item_id"]}
    changes = {"benchmark_filename": [*files], "load_col": columns, "train_sampling": "prefix_last"}
    run_dir = train_known(tmp_path, model, changes)
    restored = restore(run_dir)
    batch = next(iter(restored.loaders[2]))[0]
    with torch.no_grad():
        scores = restored.model.eval().full_sort_predict(batch).view(-1).tolist()
    numbers = restored.dataset.field2token_id["item_id"]
    assert len(numbers) == 6
    (found,) = load(run_dir, use_gpu=False).recommend([["d", "c", "e"]], k=9, exclude_seen=False)
    assert found.unknown == []
    assert set(found.items) == set("abcde")
    torch.testing.assert_close(found.scores, [scores[numbers[item]] for item in found.items])


def test_a_model_that_needs_the_data_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """FPMC scores users, which a history is not."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    run_dir = train_known(tmp_path, "FPMC", {})
    with pytest.raises(UserError, match=r"model=FPMC cannot be built from .* the evaluate command"):
        load(run_dir)


def test_movies_have_titles(tmp_path: Path) -> None:
    small = {
        "train_batch_size": 256,
        "user_inter_num_interval": "[300,inf)",
        "topk": [5],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    result = train(tmp_path, "ml-100k", **small)
    recommender = load(result.run_dir)
    assert recommender.title("50") == "Star Wars (50)"
    assert recommender.title("nope") == "nope"
    (found,) = recommender.recommend([["50", "172"]], k=3)
    assert all(recommender.title(item).endswith(f" ({item})") for item in found.items)


def test_without_titles_the_id_is_shown(recommender: Recommender) -> None:
    assert recommender.title("i1") == "i1"


# ---------------------------------------------------------------------- augmented data


def augmented(folder: Path, **changes: Any) -> Trained:
    """A backbone on data that DiffuASR lengthened with random items; the data set is deleted."""
    write_inter(folder / "dataset", "toy", SEQUENCES)
    backbone = changes.pop("backbone", "GRU4Rec")
    known = Config(backbone, "toy").final_config_dict
    values = {k: v for k, v in SMALL.items() if k in known} | {"epochs": 1}
    values |= {"backbone": backbone, "augmenter": "random", "n_pseudo": 2} | changes
    folders = {"data_path": str(folder / "dataset"), "checkpoint_dir": str(folder / "saved")}
    config = Config("DiffuASR", "toy", overrides=values | folders)
    items = create_dataset(config).field2token_id["item_id"]
    run_dir = Path(run_stages(config).run_dir)
    shutil.rmtree(folder / "dataset")
    return Trained(run_dir, len(items), items)


def test_a_model_of_augmented_data_recommends_to_real_histories(tmp_path: Path) -> None:
    """Which are what a user has: the checkpoint's histories hold no invented item either."""
    trained = augmented(tmp_path)
    recommender = load(trained.run_dir, use_gpu=False)
    assert type(recommender.model).__name__ == "GRU4Rec"
    for user, items in SEQUENCES.items():
        assert recommender.history(user) == items
    (found,) = recommender.recommend([["i1", "i2"]], k=12, exclude_seen=False)
    scores = model_scores(recommender, trained, ["i1", "i2"])
    torch.testing.assert_close(
        found.scores, [scores[trained.number[i]].item() for i in found.items]
    )
    assert set(found.items) == ITEMS


def test_a_model_that_expects_invented_items_is_refused(tmp_path: Path) -> None:
    trained = augmented(tmp_path, pseudo_at_evaluation=True)
    message = r"best\.safetensors was trained with pseudo_at_evaluation=True: .* the evaluate comm"
    with pytest.raises(UserError, match=message):
        load(trained.run_dir, use_gpu=False)


def test_a_refusal_calls_the_model_what_the_user_called_it(tmp_path: Path) -> None:
    """SHAN scores users: backbone or not, it cannot recommend to a history."""
    trained = augmented(tmp_path, backbone="SHAN", embedding_size=8)
    recommender = load(trained.run_dir, use_gpu=False)
    with pytest.raises(UserError, match=r"model=DiffuASR reads .user_id. besides the history"):
        recommender.recommend([["i1", "i2"]])
