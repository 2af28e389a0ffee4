"""``init_from``: what is carried over by id, what is new, what is refused, what needs no source."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff import checkpoint, evaluate, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.runs.warm_start import warm_start
from recbole_simdiff.serving.strip import strip
from tests.conftest import SEQUENCES, write_inter

# The next day: user f is gone, g is new; i3 is gone, n1 and n2 are new; others go on. The ids come
# in another order, so that numbers differ.
NEXT = {
    "g": ["n2", "n1", "i5", "i12", "i4"],
    "e": ["i5", "i6", "i7", "n1", "i8", "i1"],
    "d": ["i4", "i2", "i12", "i11", "i10"],
    "c": ["i9", "i8", "i7", "i6", "i11", "i12", "i1"],
    "a": ["i1", "i2", "i4", "i5", "i6", "i7", "i8", "i9", "i10"],
    "h": ["i1", "i2", "n3"],
}
TABLE = "item_embedding.weight"


@pytest.fixture
def source(make_config: Any, data_path: Path) -> Path:
    """Run folder of an encoder on ``toy``; ``next`` is there, too."""
    write_inter(data_path, "next", NEXT)
    return Path(run(make_config("SASRecCE")).run_dir)


def weights(run_dir: str | Path, name: str = BEST) -> dict[str, torch.Tensor]:
    return checkpoint.subset(checkpoint.load(Path(run_dir) / name)[0], "model")


def started(config: Any) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Data set, weights before any step, and what is logged."""
    dataset, train, _, _, model = build_run(config)
    lines = warm_start(config, dataset, train._dataset, model)
    return dataset, model.state_dict(), lines


def test_rows_go_by_id_and_the_rest_as_it_is(make_config: Any, source: Path) -> None:
    dataset, here, (line,) = started(make_config("SASRecCE", "next", init_from=str(source)))
    there, old_ids = weights(source), checkpoint.load(source / BEST)[1]["items"]
    assert dataset.item_ids != old_ids
    for number, item in enumerate(dataset.item_ids):
        if item in old_ids:
            assert torch.equal(here[TABLE][number], there[TABLE][old_ids.index(item)]), item
    others = here.keys() - {TABLE}
    assert all(torch.equal(here[name], there[name]) for name in others)
    assert (
        "11 items carried over, 1 gone, 3 new (2 from the items they occur with, 1 fresh)" in line
    )
    assert f"{len(others)} other tensors carried over" in line
    assert f"SASRecCE in {source / BEST}" in line


def test_new_items_start_as_the_mean_of_their_company(make_config: Any, source: Path) -> None:
    """n1 is in the training parts of g (with i5) and e (with i5, i6, i7); n3 is in none."""
    config = make_config("SASRecCE", "next", init_from=str(source))
    dataset, here, _ = started(config)
    number = dataset.item_ids.index
    i5, i6, i7 = (here[TABLE][number(item)] for item in ("i5", "i6", "i7"))
    assert torch.allclose(here[TABLE][number("n1")], (2 * i5 + i6 + i7) / 4)
    assert torch.allclose(here[TABLE][number("n2")], i5)
    fresh = build_run(make_config("SASRecCE", "next"))[-1].state_dict()[TABLE]
    assert torch.equal(here[TABLE][number("n3")], fresh[number("n3")])


@pytest.mark.parametrize("mode", ["init", "frozen"])
def test_vectors_give_new_items_their_start(make_config: Any, source: Path, mode: str) -> None:
    ids = sorted({item for items in NEXT.values() for item in items})
    vectors = np.random.default_rng(1).normal(size=(len(ids), 8)).astype(np.float32)
    np.savez("v.npz", ids=ids, vectors=vectors)
    config = make_config(
        "SASRecCE",
        "next",
        init_from=str(source),
        item_vectors="v.npz",
        item_vectors_mode=mode,
    )
    dataset, here, (line,) = started(config)
    there, old_ids = weights(source), checkpoint.load(source / BEST)[1]["items"]
    for number, item in enumerate(dataset.item_ids[1:], start=1):
        vector = torch.from_numpy(vectors[ids.index(item)])
        known = mode == "init" and item in old_ids
        expected = there[TABLE][old_ids.index(item)] if known else vector
        assert torch.equal(here[TABLE][number], expected), item
    said = "3 new (from item_vectors, mode init)"
    assert (said if mode == "init" else "the item table is item_vectors, mode frozen") in line


def test_the_same_data_go_on_where_the_source_stopped(make_config: Any, source: Path) -> None:
    """With nothing new the start is the source, whose scores it has."""
    _, here, (line,) = started(make_config("SASRecCE", init_from=str(source / BEST)))
    assert all(torch.equal(here[name], value) for name, value in weights(source).items())
    assert "12 items carried over, 0 gone, 0 new" in line


def test_what_belongs_to_a_run_is_not_carried_over(make_config: Any) -> None:
    """Running means and neighbours of the source are not those of the new data."""
    source = run(make_config("SimDiffRec", noise_refresh="epoch")).run_dir
    for values in ({"noise_refresh": "epoch"}, {"cl_balance": 0.1}):
        _, here, _ = started(make_config("SimDiffRec", init_from=source, **values))
        assert torch.equal(here["item_embedding.weight"], weights(source)["item_embedding.weight"])
        (name,) = {"neighbours", "gradient_norms"} & here.keys()
        assert not here[name].any()


def test_rows_of_users_go_by_id_too(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "next", NEXT)
    source = run(make_config("HGN", embedding_size=8)).run_dir
    config = make_config("HGN", "next", embedding_size=8, init_from=source)
    dataset, here, (line,) = started(config)
    (name,) = (name for name in here if "user" in name and len(here[name]) == dataset.user_num)
    there, old_ids = weights(source)[name], checkpoint.load(Path(source) / BEST)[1]["users"]
    for number, user in enumerate(dataset.user_ids):
        if user in old_ids:
            assert torch.equal(here[name][number], there[old_ids.index(user)]), user
    assert "4 users carried over, 2 gone, 2 new (fresh)" in line


@pytest.mark.parametrize("length", [13, 14])
def test_positions_are_no_items_though_there_are_as_many(
    make_config: Any, data_path: Path, length: int
) -> None:
    """13 with padding, here and there; the ids come in another order."""
    turned = {user: items[::-1] for user, items in reversed(SEQUENCES.items())}
    write_inter(data_path, "turned", turned)
    source = run(make_config("SASRecCE", MAX_ITEM_LIST_LENGTH=length)).run_dir
    config = make_config("SASRecCE", "turned", MAX_ITEM_LIST_LENGTH=length, init_from=source)
    dataset, here, (line,) = started(config)
    there, old_ids = weights(source), checkpoint.load(Path(source) / BEST)[1]["items"]
    assert (len(old_ids), dataset.item_num) == (13, 13)
    assert torch.equal(here["position_embedding.weight"], there["position_embedding.weight"])
    numbers = [old_ids.index(item) for item in dataset.item_ids]
    assert numbers != list(range(13))
    assert torch.equal(here[TABLE], there[TABLE][numbers])
    assert "12 items carried over, 0 gone, 0 new" in line


def test_users_are_no_items_though_there_are_as_many(make_config: Any, data_path: Path) -> None:
    write_inter(data_path, "square", {f"u{i}": ["i1", "i2", f"i{1 + i % 6}"] for i in range(6)})
    write_inter(data_path, "other", {f"u{5 - i}": [f"i{6 - i}", "i3", "i1"] for i in range(6)})
    small = {"embedding_size": 8, "topk": [1, 5]}
    source = run(make_config("HGN", "square", **small)).run_dir
    dataset, here, _ = started(make_config("HGN", "other", init_from=source, **small))
    content = checkpoint.load(Path(source) / BEST)[1]
    assert len(content["items"]) == len(content["users"]) == dataset.user_num == dataset.item_num
    for name, ids, old in (
        ("user_embedding.weight", dataset.user_ids, content["users"]),
        (TABLE, dataset.item_ids, content["items"]),
    ):
        numbers = [old.index(raw) for raw in ids]
        assert numbers != sorted(numbers)
        assert torch.equal(here[name], weights(source)[name][numbers]), name


@pytest.mark.parametrize("model", ["BERT4Rec", "GRU4Rec", "SimDiffRec", "CaDiRec", "MCLRec"])
def test_other_models_train_from_it(make_config: Any, data_path: Path, model: str) -> None:
    """Of this package and RecBole's; a mask token behind the items is carried over."""
    write_inter(data_path, "next", NEXT)
    needs = {"GRU4Rec": {"embedding_size": 8}, "BERT4Rec": {"mask_ratio": 0.5}}.get(model, {})
    source = run(make_config(model, epochs=1, **needs)).run_dir
    config = make_config(model, "next", epochs=1, init_from=source, **needs)
    _, here, (line,) = started(config)
    assert "11 items carried over, 1 gone, 3 new" in line
    if model == "BERT4Rec":
        assert torch.equal(here[TABLE][-1], weights(source)[TABLE][-1])
        return  # short rows without any mask make RecBole's loss NaN on so few data
    result = run(config)
    assert result.test
    assert "init_from: " in next(Path(result.run_dir).glob("*.log")).read_text()


def test_the_source_is_read_once_only(make_config: Any, source: Path) -> None:
    """Evaluation, recommendation and a resumed training go on where it is gone."""
    whole = run(make_config("SASRecCE", "next", init_from=str(source)))
    begun = run(make_config("SASRecCE", "next", init_from=str(source), epochs=1))
    shutil.rmtree(source)
    found = evaluate(whole.run_dir)
    assert (found.valid, found.test) == (whole.valid, whole.test)
    assert load(whole.run_dir).recommend([["i1", "n1"]], k=3)
    last = Path(begun.run_dir) / LAST
    resumed = run(resumed_config(last, {"epochs": 2}), resume=last)
    assert resumed.test == whole.test


def test_a_checkpoint_of_before_is_still_resumed(make_config: Any, source: Path) -> None:
    """It lacks the settings of a start, which it has behind it."""
    tensors, content = checkpoint.load(source / LAST)
    for key in ("init_from", "epochs_from"):
        del content["config"]["values"][key]
    checkpoint.save(source / LAST, tensors, content)
    config = resumed_config(source / LAST, {"epochs": 3})
    assert run(config, resume=source / LAST).epochs == 3


def test_a_stripped_checkpoint_is_enough(make_config: Any, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    strip(source, path)
    config = make_config("SASRecCE", "next", init_from=str(path))
    assert "11 items carried over, 1 gone, 3 new" in started(config)[2][0]


def test_the_content_names_the_result(make_config: Any, source: Path) -> None:
    config = make_config("SASRecCE", "next", init_from=str(source))
    before = fingerprint(config, "data")
    assert fingerprint(config, "data") == before
    assert fingerprint(make_config("SASRecCE", "next"), "data") != before
    tensors, content = checkpoint.load(source / BEST)
    checkpoint.save(
        source / BEST, tensors | {f"model.{TABLE}": tensors[f"model.{TABLE}"] + 1}, content
    )
    other = fingerprint(config, "data")
    content["items"][1], content["items"][2] = content["items"][2], content["items"][1]
    checkpoint.save(source / BEST, tensors, content)
    assert len({before, other, fingerprint(config, "data")}) == 3


def test_what_does_not_fit_is_refused(make_config: Any, source: Path, tmp_path: Path) -> None:
    def refused(model: str, message: str, **values: Any) -> None:
        place = values.pop("init_from", str(source))
        with pytest.raises(UserError, match=message):
            run(make_config(model, "next", init_from=place, **values))

    refused("SASRecCE", r"no checkpoint at .*gone", init_from=str(tmp_path / "gone"))
    refused("SASRecCE", "init_from=3 must be text", init_from=3)
    refused("SimDiffRec", "is a run of model=SASRecCE, not of SimDiffRec")
    refused(
        "SASRecCE", r"has shape .* Settings that differ: .*hidden_size=16, there 8", hidden_size=16
    )
    refused("SASRecCE", "MAX_ITEM_LIST_LENGTH=3, there 4", MAX_ITEM_LIST_LENGTH=3)
    refused("SASRecCE", r"trm_encoder\.\S+\. Sizes must .*n_layers=1, there 2", n_layers=1)
    refused("SASRecCE", "lacks repeat_bias", repeat_bias="learned")
    refused("DiffuASR", "not available for DiffuASR", backbone="SASRecCE")
    refused("DreamRec", "both give the item embeddings", item_table=str(source))
    pop = run(make_config("Pop")).run_dir
    refused("Pop", "computed from the data at once", init_from=pop)
    assert not list((tmp_path / "saved").glob("*-next-*"))  # refused before a folder is made


def test_a_source_that_may_have_seen_the_held_out_is_noted(make_config: Any, source: Path) -> None:
    everything = {"split": {"RS": [1, 0, 0]}, "group_by": "user"}
    served = run(make_config("SASRecCE", eval_args=everything)).run_dir
    config = make_config("SASRecCE", "next", init_from=served)
    assert "may have seen what is held out" in started(config)[2][1]
    config = make_config("SASRecCE", "next", init_from=str(source), eval_args=everything)
    assert len(started(config)[2]) == 1


def test_data_sets_differ_in_the_test_itself(make_config: Any, data_path: Path) -> None:
    """Else rows by number and rows by id could not be told apart."""
    write_inter(data_path, "next", NEXT)
    old, new = (create_dataset(make_config("SASRecCE", name)).item_ids for name in ("toy", "next"))
    assert sum(a != b for a, b in zip(old, new, strict=False)) >= 8
