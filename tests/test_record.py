"""What a result says about how it was made, and that a run can be repeated from it."""

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.cli.replay import finished_run
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import parse_overrides
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.execute import DONE, LINES, append_line
from recbole_simdiff.runs.record import (
    circumstances,
    data_checksum,
    figures,
    git_state,
    repeated_config,
    train_arguments,
)
from recbole_simdiff.runs.result import RESULT, read_result
from recbole_simdiff.runs.run import LEAK, run_one
from tests.conftest import SEQUENCES, write_inter

FORMER = Path(__file__).parent / "former"


@pytest.fixture
def finished(make_config: Any) -> Path:
    """Folder of a run of SASRecCE."""
    return Path(run_one(make_config("SASRecCE", epochs=1)).run_dir)


def edited(run_dir: Path, **changes: Any) -> None:
    """Change fields of a run's ``result.json``."""
    path = run_dir / RESULT
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_leaves_its_record(finished: Path) -> None:
    record = json.loads((finished / RESULT).read_text())["record"]
    assert record == read_result(finished).record
    assert record.keys() == {"command", "git", "source", "data", "seed", "host"}
    assert record["command"][:3] == ["train", "--model=SASRecCE", "--dataset=toy"]
    assert "--epochs=1" in record["command"]
    assert record["host"]["threads"] == 1
    assert record["host"]["gpu"] is None
    assert record["seed"] == 2020
    for name in filter(None, (platform.node(), os.environ.get("HOME", "").strip("/"))):
        assert name not in json.dumps(record | {"command": []})


def test_the_command_of_the_record_trains_the_same(finished: Path, capsys: Any) -> None:
    before = read_result(finished)
    for folder in finished.parent.glob("*"):
        if folder != finished:
            shutil.rmtree(folder)
    assert main(before.record["command"]) == 0
    (other,) = (f for f in finished.parent.iterdir() if f.is_dir() and f != finished)
    after = read_result(other)
    assert all(figure.equal for figure in figures(before, after))
    assert after.config == before.config


@pytest.mark.parametrize(
    "value", ["no", "1e-3", "a: b", "#x", "[1]", "None", "null", "x y", "-", "a "]
)
def test_values_come_back_from_the_command(make_config: Any, value: str) -> None:
    config = make_config("SASRecCE", wandb_project=value, topk=[1, 5], valid_metric="MRR@5")
    command = train_arguments(config)
    given = parse_overrides(command[3:])
    assert given["wandb_project"] == value
    assert given["topk"] == [1, 5]
    assert set(given) <= set(config.plain()["values"])


def test_the_command_names_backbone_and_processes() -> None:
    command = train_arguments(Config("DiffuASR", "toy", (), {"backbone": "GRU4Rec"}), 4)
    assert command[:3] == ["train", "--model=DiffuASR", "--dataset=toy"]
    assert "--backbone=GRU4Rec" in command
    assert command[-1] == "--nproc=4"


def test_another_byte_of_the_data_is_another_checksum(make_config: Any, data_path: Path) -> None:
    before = data_checksum(make_config())
    assert re.fullmatch("[0-9a-f]{16}", before)
    write_inter(data_path, "other", SEQUENCES)
    assert data_checksum(make_config()) == before
    path = data_path / "toy" / "toy.inter"
    path.write_text(path.read_text() + "f\ti2\t9\n")
    assert data_checksum(make_config()) != before


# ---------------------------------------------------------------- git


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command."""
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_state_is_that_of_the_package(tmp_path: Path) -> None:
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    (package / "version.py").write_text("1")
    assert git_state(package) == {}  # no clone
    git(tmp_path / "clone", "init", "-q")
    assert git_state(package) == {}  # installed inside somebody's project
    git(tmp_path / "clone", "add", ".")
    git(tmp_path / "clone", "commit", "-qm", "one")
    commit = git(tmp_path / "clone", "rev-parse", "HEAD")
    assert git_state(package) == {"commit": commit, "changed": False}
    (tmp_path / "clone" / "notes").write_text("not of the package")
    assert git_state(package) == {"commit": commit, "changed": False}
    (package / "version.py").write_text("2")
    assert git_state(package) == {"commit": commit, "changed": True}


def test_without_git_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {}


# ---------------------------------------------------------------- replay


def test_replay_gives_the_same_figures(finished: Path, capsys: Any) -> None:
    before = set(finished.parent.iterdir())
    assert main(["replay", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "all 38 figures are equal" in out
    assert "another" not in out
    (new,) = (f for f in set(finished.parent.iterdir()) - before if f.is_dir())
    assert f"repetition of {finished}: {new}" in out
    assert (new / RESULT).is_file()


def test_replay_tells_which_figures_differ_and_why(
    finished: Path, data_path: Path, capsys: Any
) -> None:
    test = read_result(finished).test
    value = test["history kept"]["hit@5"]
    test["history kept"]["hit@5"] = value + 0.25
    edited(finished, test=test)
    path = data_path / "toy" / "toy.item"
    path.write_text("item_id:token\ni1\n")
    assert main(["replay", str(finished)]) == 1
    out = capsys.readouterr().out
    assert "another checksum of the data: " in out
    assert "1 of 38 figures differ:" in out
    line = next(line for line in out.splitlines() if line.startswith("test, history kept, hit@5"))
    assert line.split()[-3:] == [f"{value + 0.25:.6g}", f"{value:.6g}", "-0.25"]


def test_replay_of_a_line_of_results(finished: Path, tmp_path: Path, capsys: Any) -> None:
    content = json.loads((finished / RESULT).read_text())
    for status, seed in (("failed", 1), (DONE, 2)):
        append_line(
            tmp_path / LINES,
            content | {"status": status, "fingerprint": str(seed), "row": "SASRecCE"},
        )
    assert main(["replay", f"{tmp_path / LINES}:2"]) == 0
    assert main(["replay", f"{tmp_path / LINES}:1"]) == 2
    assert "is not the record of a finished run" in capsys.readouterr().err
    for number in ("0", "3", "-1", "x", ""):
        with pytest.raises(UserError, match="is not a line of results"):
            finished_run(f"{tmp_path / LINES}:{number}")
    for place in (tmp_path, tmp_path / LINES):
        with pytest.raises(UserError, match="name one by its line"):
            finished_run(str(place))


@pytest.mark.parametrize("model", ["SimDiffRec", "GRU4Rec", "DreamRec"])
def test_runs_without_a_record_can_be_repeated(
    model: str, data_path: Path, tmp_path: Path, capsys: Any
) -> None:
    """Version 0.1.0 trained on the same data; arithmetic may differ in the last bits."""
    places = [f"--data_path={data_path}", f"--checkpoint_dir={tmp_path / 'new'}"]
    code = main(["replay", str(FORMER / model), *places])
    out = capsys.readouterr().out
    assert code in (0, 1)
    assert "figures" in out
    (new,) = (tmp_path / "new").glob("*/result.json")
    before, after = read_result(FORMER / model), read_result(new.parent)
    for figure in figures(before, after):
        assert figure.after == pytest.approx(figure.before, abs=1e-6), figure.name


def test_replay_reads_the_item_table_again(make_config: Any, finished: Path) -> None:
    config = make_config("DreamRec", item_table=str(finished), epochs=1, hidden_size=8)
    before = run_one(config)
    after = run_one(repeated_config(before, {}))
    assert all(figure.equal for figure in figures(before, after))


def test_replay_begins_as_the_run_did(make_config: Any) -> None:
    """With the weights, or for the epochs, of another run."""
    first = run_one(make_config("SASRecCE", epochs=3, seed=1)).run_dir
    args = {"split": {"LS": "test_only"}}
    for given in ({"init_from": first, "epochs": 1}, {"epochs_from": first, "eval_args": args}):
        before = run_one(make_config("SASRecCE", **{"epochs": 9} | given))
        after = run_one(repeated_config(before, {}))
        assert all(figure.equal for figure in figures(before, after)), given


def test_replay_refuses_what_would_be_another_run(finished: Path, capsys: Any) -> None:
    assert main(["replay", str(finished), "--epochs=3"]) == 2
    assert "epochs cannot be changed here" in capsys.readouterr().err
    edited(finished, processes=2)
    assert main(["replay", str(finished)]) == 2
    assert "trained by 2 processes" in capsys.readouterr().err
    assert main(["replay", str(finished.parent)]) == 2
    assert "is not the result of a finished run" in capsys.readouterr().err


def test_a_result_never_names_code_to_run(finished: Path, tmp_path: Path, capsys: Any) -> None:
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: pass\n")
    config = read_result(finished).config | {"model": f"{trap}:Trap"}
    edited(finished, config=config)
    assert main(["replay", str(finished)]) == 2
    assert "runs no code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_circumstances_name_what_changed(finished: Path) -> None:
    before, after = read_result(finished), read_result(finished)
    assert circumstances(before, after) == []
    after.versions = before.versions | {"torch": "9.9"}
    after.record = before.record | {"host": before.record["host"] | {"threads": 64}}
    assert circumstances(before, after) == [
        f"version of torch: {before.versions['torch']}, now 9.9",
        "threads: 1, now 64",
    ]


def test_a_number_that_one_result_lacks_is_a_difference(finished: Path) -> None:
    before, after = read_result(finished), read_result(finished)
    del after.test["history kept"]["hit@1"]
    assert [f.name for f in figures(before, after) if not f.equal] == ["test, history kept, hit@1"]
    assert [f.name for f in figures(after, before) if not f.equal] == ["test, history kept, hit@1"]


# ---------------------------------------------------------------- the leak of leave-one-out


def test_the_leak_of_leave_one_out_is_said_once(make_config: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    first = run_one(make_config("SASRecCE", epochs=1))
    assert [r.getMessage() for r in caplog.records].count(LEAK) == 1
    caplog.clear()
    run_one(make_config("SASRecCE", epochs=2), resume=Path(first.run_dir) / LAST)
    assert LEAK not in caplog.text


def test_the_command_of_the_note_gives_a_split_that_does_not_leak(
    make_config: Any, caplog: Any
) -> None:
    caplog.set_level("INFO")
    typed = re.search("--eval_args='(.*)'", LEAK)
    assert typed
    given = parse_overrides([f"--eval_args={typed[1]}"])
    config = make_config("SASRecCE", epochs=1, **given)
    assert run_one(config).test
    assert "leave-one-out" not in caplog.text
    flat = create_dataset(config)
    train, valid, test = flat.build()
    newest = [part.inter_feat[part.time_field].max() for part in (train, valid)]
    oldest = [part.inter_feat[part.time_field].min() for part in (valid, test)]
    assert all(a <= b for a, b in zip(newest, oldest, strict=True))
