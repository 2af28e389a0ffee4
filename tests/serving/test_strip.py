"""A checkpoint without users: nothing of them is left, and it recommends as before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff import UserError, checkpoint, evaluate, load
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.runs.run import run_once, run_one
from recbole_simdiff.serving.strip import strip
from tests.conftest import SEQUENCES
from tests.serving.conftest import config_of, train


@pytest.fixture
def stripped(run_dir: Path, tmp_path: Path) -> Path:
    """The run's best epoch without users, written by the command."""
    path = tmp_path / "model.safetensors"
    assert main(["checkpoint", "strip", f"--checkpoint={run_dir}", f"--output={path}"]) == 0
    return path


def test_it_recommends_as_before(run_dir: Path, stripped: Path) -> None:
    before, after = load(run_dir, use_gpu=False), load(stripped, use_gpu=False)
    histories: list[list[str]] = [["i1"], SEQUENCES["a"], []]
    for fallback in (None, "popular"):
        wanted = before.recommend(histories, fallback=fallback)
        assert after.recommend(histories, fallback=fallback) == wanted
    assert (after.item_vectors().values == before.item_vectors().values).all()


def test_nothing_of_users_and_of_the_machine_is_left(run_dir: Path, stripped: Path) -> None:
    tensors, content = checkpoint.load(stripped)
    assert {name.partition(".")[0] for name in tensors} == {"model", "data"}
    assert [name for name in tensors if name.startswith("data.")] == ["data.item_counts"]
    assert content["users"] == ["[PAD]"]
    assert content["n_users"] == 1 + len(SEQUENCES)
    assert load(stripped, use_gpu=False).users == []
    assert str(run_dir.parent.parent) not in stripped.read_bytes().decode("latin-1")
    with pytest.raises(UserError, match=r"user 'a' is not in the data set .* \(0 users\)"):
        load(stripped, use_gpu=False).history("a")


def test_no_path_of_what_it_was_trained_with_is_left(run_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "SASRecCE"
    table.symlink_to(run_dir)
    given = {"item_table": str(table), "hidden_size": 8, "diffusion_steps": 20}
    before = train(tmp_path, "DreamRec", **given)
    strip(before, tmp_path / "model.safetensors")
    assert str(tmp_path) not in (tmp_path / "model.safetensors").read_bytes().decode("latin-1")
    found, wanted = (
        load(p, use_gpu=False).recommend([["i1"]]) for p in (tmp_path / "model.safetensors", before)
    )
    assert found == wanted


def test_stripped_twice_is_the_same(stripped: Path, tmp_path: Path) -> None:
    strip(stripped, tmp_path / "again.safetensors")
    # Bytes may differ: safetensors writes its header in any order.
    tensors, content = checkpoint.load(tmp_path / "again.safetensors")
    before = checkpoint.load(stripped)
    assert content == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in tensors.items())


def test_it_is_not_evaluated_or_resumed(stripped: Path, data_path: Path, capsys: Any) -> None:
    with pytest.raises(UserError, match="holds no users and histories"):
        evaluate(stripped, {"data_path": str(data_path)})
    assert main([f"--resume={stripped}"]) == 2
    assert "cannot be resumed from" in capsys.readouterr().err


def test_a_model_that_reads_users_is_refused(tmp_path: Path) -> None:
    run_dir = train(tmp_path, "SHAN", embedding_size=8)
    with pytest.raises(UserError, match="reads 'user_id' besides the history"):
        strip(run_dir, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


def test_mistakes_are_named(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    own = run_dir / "best.safetensors"
    given = ["checkpoint", "strip", f"--checkpoint={run_dir}"]
    for output, message in ((own, "is the checkpoint itself"), ("x.bin", "must end in")):
        assert main([*given, f"--output={output}"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("counts", [[1, 2], [-1] * 13, [0.5] * 13])
def test_counts_that_are_none_are_refused(stripped: Path, counts: list[Any]) -> None:
    tensors, content = checkpoint.load(stripped)
    checkpoint.save(stripped, {**tensors, "data.item_counts": torch.tensor(counts)}, content)
    with pytest.raises(UserError, match=r"its data\.item_counts are not those of 12 items"):
        load(stripped, use_gpu=False)


# ---------------------------------------------------------------- without_users


def test_a_training_may_leave_users_out_itself(tmp_path: Path) -> None:
    """As strip does afterwards; nothing that could be resumed is left."""
    kept = train(tmp_path / "kept")
    left = train(tmp_path / "left", without_users=True)
    strip(kept, tmp_path / "model.safetensors")
    wanted, found = (checkpoint.load(p) for p in (tmp_path / "model.safetensors", left / BEST))
    assert wanted[0].keys() == found[0].keys()
    assert all(torch.equal(value, found[0][name]) for name, value in wanted[0].items())
    assert wanted[1].keys() == found[1].keys()
    assert found[1]["users"] == ["[PAD]"]
    assert not (left / LAST).exists()
    assert json.loads((left / "result.json").read_text())["test"]
    assert load(left, use_gpu=False).recommend([["i1"]], k=3)
    for path in left.rglob("*"):
        assert path.is_dir() or path.suffix in {".json", ".log", ".safetensors"}, path


def test_a_search_strips_only_what_is_tested(tmp_path: Path) -> None:
    """A trial is continued to be tested."""
    config = config_of(tmp_path, without_users=True)
    folder = tmp_path / "run"
    run_one(config, run_dir=folder, test=False)
    assert (folder / LAST).exists()
    run_once(config, folder)
    assert not (folder / LAST).exists()


def test_a_run_that_was_stopped_before_it_was_stripped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_one(config_of(tmp_path), run_dir=folder)
    run_once(config_of(tmp_path, without_users=True), folder)
    assert not (folder / LAST).exists()
    assert checkpoint.load(folder / BEST)[1]["users"] == ["[PAD]"]


def test_a_model_that_reads_users_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without_users=True: model=SHAN reads 'user_id' besides"):
        train(tmp_path, "SHAN", embedding_size=8, without_users=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"save_rankings": True}, "save_rankings=True writes of users"),
        ({"show_users": 2}, "show_users=2 writes of users"),
        ({"model": "DiffuASR", "backbone": "SASRecCE"}, "not available for DiffuASR"),
    ],
)
def test_what_would_tell_of_users_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path, values.pop("model", "SASRecCE"), without_users=True, **values)


def test_the_check_draws_nothing(tmp_path: Path) -> None:
    """A model that draws when it scores is trained as without it."""
    given = {"diffusion_steps": 20}
    kept = train(tmp_path / "kept", "DreamRec", **given)
    left = train(tmp_path / "left", "DreamRec", without_users=True, **given)
    wanted, found = (
        checkpoint.subset(checkpoint.load(run / BEST)[0], "model") for run in (kept, left)
    )
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
