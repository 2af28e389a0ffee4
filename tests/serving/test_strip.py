"""A checkpoint without users: nothing of them is left, and it recommends as before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_simdiff import UserError, checkpoint, evaluate, load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.strip import strip
from tests.conftest import SEQUENCES
from tests.serving.conftest import train


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


def test_stripped_twice_is_the_same(stripped: Path, tmp_path: Path) -> None:
    strip(stripped, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == stripped.read_bytes()


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
