"""Runs are made once, recorded once, continued, and fail alone."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.evaluation.rankings import LISTS, RANKS
from recbole_simdiff.experiments import execute
from recbole_simdiff.experiments.execute import (
    DONE,
    FAILED,
    LINES,
    append_line,
    collect,
    plan,
    read_lines,
)
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import evaluate
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from tests.experiments.conftest import CONTENT, tiny

identity = importlib.import_module("recbole_simdiff.runs.identity")


@pytest.fixture
def done(experiment: Any, tmp_path: Path) -> Any:
    """done(key=value, ...) -> (planned, path of the lines, runs with their lines)."""

    def make(**changes: Any) -> Any:
        planned = plan(experiment(**changes))
        path = tmp_path / "results" / "parts" / LINES
        execute.execute(planned, path)
        return planned, path, collect(planned, path)

    return make


def test_each_run_leaves_a_line_that_says_all(done: Any) -> None:
    planned, path, collected = done()
    assert len(path.read_text().splitlines()) == len(planned) == len(collected) == 4
    for one, line in collected:
        assert line["status"] == DONE
        assert line["fingerprint"] == one.fingerprint
        assert line["seed"] == one.spec.seed == line["config"]["values"]["seed"]
        assert line["test"].keys() == {KEPT, REMOVED}
        assert line["epochs"] == len(line["log"]) == 1
        assert line["statistics"] == {
            "users": 6,
            "items": 12,
            "actions": 30,
            "pairs": 30,
            "ties": 0,
        }
        assert {"recbole_simdiff", "torch", "python"} <= line["versions"].keys()
        assert line["seconds"] > 0
        assert line["peak_memory_mb"] > 10
        assert len(line["data"]) == 16
        stored = json.loads((one.run_dir / RESULT).read_text())
        assert line["test"] == stored["test"]
        assert {p.name for p in one.run_dir.iterdir()} >= {BEST, RANKS, LISTS}
        assert not (one.run_dir / LAST).exists()


def test_a_run_equals_one_by_the_train_command(done: Any) -> None:
    """Whatever process it is made in."""
    (one, line), *_ = done(seeds=[1])[2]
    alone = run(one.config)
    assert line["test"] == alone.test


def test_nothing_is_trained_twice(done: Any) -> None:
    planned, path, _ = done(seeds=[1])
    before = {p: p.stat().st_mtime_ns for p in planned[0].run_dir.parent.rglob("*.safetensors")}
    text = path.read_text()
    done(seeds=[1])
    assert path.read_text() == text
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_experiment_takes_the_run_over(
    done: Any, experiment: Any, tmp_path: Path, caplog: Any
) -> None:
    planned, _, _ = done(seeds=[1])
    before = (planned[0].run_dir / BEST).stat().st_mtime_ns
    other = tmp_path / "results" / "other" / LINES
    execute.execute(plan(experiment(seeds=[1], title="Other")), other)
    assert len(read_lines(other)) == 2
    assert (planned[0].run_dir / BEST).stat().st_mtime_ns == before


def test_runs_that_are_the_same_are_made_once(done: Any) -> None:
    rows = {"SimDiffRec": {}, "the default": {"model": "SimDiffRec", "tau": 0.05}}
    planned, path, collected = done(rows=rows, seeds=[1])
    assert planned[0].fingerprint == planned[1].fingerprint
    assert len(path.read_text().splitlines()) == 1
    assert [one.spec.row for one, _ in collected] == ["SimDiffRec", "the default"]


def test_what_shapes_a_result_shapes_its_name(experiment: Any, data_path: Path) -> None:
    def name(**command: Any) -> str:
        return plan(experiment(seeds=[1], command=command))[0].fingerprint

    first = name()
    assert name(learning_rate=0.5) != first
    assert name(epochs=3) != first
    assert name(eval_batch_size=3, show_progress=True, state="ERROR") == first
    with open(data_path / "toy" / "toy.inter", "a") as file:
        file.write("f\ti2\t9\n")
    assert name() != first


def test_a_failed_run_is_a_line_and_the_rest_goes_on(done: Any, experiment: Any) -> None:
    """The learning rate of one row makes its loss infinite."""
    rows = {"bad": {"model": "SimDiffRec", "learning_rate": 1e30}, "SimDiffRec": {}}
    planned, path, collected = done(rows=rows, seeds=[1], command={"epochs": 3})
    (_, line), (_, good) = collected
    assert line["status"] == FAILED
    assert "TrainingDiverged" in line["error"]
    assert "traceback" not in line
    assert line["config"]["values"]["learning_rate"] == 1e30
    assert good["status"] == DONE
    execute.execute(planned, path)  # what failed is tried again
    assert [json.loads(t)["row"] for t in path.read_text().splitlines()] == [
        *("bad", "SimDiffRec", "bad")
    ]


def test_a_process_that_dies_is_a_failed_run(done: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(execute, "_work", _die)
    _, _, collected = done(seeds=[1])
    assert [line["status"] for _, line in collected] == [FAILED] * 2
    assert collected[0][1]["error"] == "the process ended with code 7"


def _die(*_: Any) -> None:
    os._exit(7)


def test_several_at_a_time(done: Any, experiment: Any, tmp_path: Path) -> None:
    """The same lines, in any order."""
    _, path, _ = done()
    first = {k: v["test"] for k, v in read_lines(path).items()}
    other = tmp_path / "other" / LINES
    again = plan(experiment(command={"checkpoint_dir": str(tmp_path / "again")}))
    execute.execute(again, other, jobs=3)
    assert {k: v["test"] for k, v in read_lines(other).items()} == first


def test_a_data_set_that_is_not_there(experiment: Any) -> None:
    with pytest.raises(UserError, match="nowhere"):
        plan(experiment(datasets=["nowhere"]))


@pytest.mark.parametrize("place", ["file", "file/below", "lines"])
def test_lines_that_cannot_be_written_are_refused_before_anything_is_trained(
    experiment: Any, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lines" / LINES).mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs\.jsonl cannot be written .* give another --output"):
        execute.execute(plan(experiment()), tmp_path / place / LINES)
    assert not (tmp_path / "saved").exists()


def record(planned: Any, **changes: Any) -> dict[str, Any]:
    """A line as a finished run leaves it, as far as this file reads it."""
    plain = json.loads(json.dumps(planned.config.plain()))
    entry = {"status": DONE, "config": plain, "data": planned.data}
    return {**entry, "fingerprint": planned.fingerprint, **changes}


def test_lines_of_other_code_or_data_count_where_there_are_none_of_todays(
    experiment: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    made, path = experiment(), tmp_path / LINES
    planned = plan(made)
    append_line(path, record(planned[0]))
    append_line(path, record(planned[0], fingerprint="later", data="other"))
    append_line(path, record(planned[1]))
    found = execute.finished(made, path)
    assert [p.spec.seed for p, _ in found] == [1, 2]
    assert [p.run_dir for p, _ in found] == [p.run_dir for p in planned[:2]]
    assert "other code" not in caplog.text
    append_line(path, record(planned[2], fingerprint="old"))
    append_line(path, record(planned[2], fingerprint="newest"))
    append_line(path, record(planned[2], fingerprint="broken", status=FAILED))
    found = execute.finished(made, path)
    assert [p.fingerprint for p, _ in found][2:] == ["newest"]
    assert found[2][0].run_dir.name == "SimDiffRec-toy-newest"
    assert f"{path}: 1 of these 3 runs were made with other code of this package" in caplog.text
    # All of them, once the code has changed.
    monkeypatch.setattr(identity, "source_checksum", lambda: "of tomorrow")
    assert [line["fingerprint"] for _, line in execute.finished(made, path)] == [
        *("later", planned[1].fingerprint, "newest")
    ]
    assert "3 of these 3 runs were made with other code" in caplog.text


def test_finished_runs_are_found_without_the_data(
    experiment: Any, data_path: Path, tmp_path: Path, caplog: Any
) -> None:
    made, path = experiment(seeds=[1]), tmp_path / LINES
    first, second = plan(made)
    for planned in (first, second):
        append_line(path, record(planned))
    shutil.rmtree(data_path / "toy")
    assert len(execute.finished(made, path)) == 2
    assert "other code" not in caplog.text
    # Runs of different data beside one another are told apart all the same.
    path.unlink()
    append_line(path, record(first))
    append_line(path, record(second, data="other", fingerprint=fingerprint(second.config, "other")))
    assert len(execute.finished(made, path)) == 2
    assert "1 of these 2 runs" in caplog.text


def test_lines_of_other_settings_are_not_taken(experiment: Any, tmp_path: Path) -> None:
    path = tmp_path / LINES
    append_line(path, record(plan(experiment(command={"tau": 0.3}))[0]))
    with pytest.raises(UserError, match=r"no finished run of parts .*, only 1 lines of other sett"):
        execute.finished(experiment(), path)
    with pytest.raises(UserError, match=r"no finished run of parts with its current settings; "):
        execute.finished(experiment(), tmp_path / "none")


def test_what_other_code_made_is_made_again_and_said(
    done: Any, monkeypatch: Any, caplog: Any
) -> None:
    caplog.set_level("INFO")
    _, path, _ = done(seeds=[1], rows={"SimDiffRec": {}})
    assert caplog.messages[0].endswith("0 runs are finished, 1 to do")
    caplog.clear()
    monkeypatch.setattr(identity, "source_checksum", lambda: "of tomorrow")
    done(seeds=[1], rows={"SimDiffRec": {}})
    again = "0 runs are finished, 1 to do, 1 of them already run with other code"
    assert again in caplog.messages[0]
    assert len(read_lines(path)) == 2


def test_a_run_tells_the_experiment_its_epochs(done: Any, monkeypatch: Any) -> None:
    """By number, whatever the lines of its log say."""
    seen: list[Any] = []
    monkeypatch.setattr(
        execute.tqdm, "set_postfix_str", lambda bar, text: seen.append((bar.n, text))
    )
    done(seeds=[1], rows={"SASRec": {}})
    epochs = [text for n, text in seen if text.startswith("train epoch")]
    assert {n for n, _ in seen} == {0, 1}
    assert len(epochs) == 2  # each as a line of the log, and as a number with that line
    assert epochs[0] == epochs[1]


def test_lost_rankings_are_made_again_without_training(done: Any) -> None:
    planned, _, _ = done(seeds=[1])
    folder = planned[0].run_dir
    text, best = (folder / RANKS).read_text(), (folder / BEST).stat().st_mtime_ns
    (folder / RANKS).unlink()
    done(seeds=[1])
    assert (folder / RANKS).read_text() == text
    assert (folder / BEST).stat().st_mtime_ns == best


def test_rankings_of_any_checkpoint(experiment: Any) -> None:
    """Of a run that was made without them."""
    (one, *_) = plan(experiment(seeds=[1]))
    plain = one.config.plain()
    values = plain["values"] | {"save_rankings": False}
    folder = Path(run(Config(plain["model"], plain["dataset"], (), values)).run_dir)
    assert not (folder / RANKS).exists()
    evaluate(folder, {"save_rankings": True})
    assert len((folder / RANKS).read_text().splitlines()) == 1 + 5


# ---------------------------------------------------------------------- the file of lines


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / LINES
    append_line(path, {"fingerprint": "a", "n": 1})
    with open(path, "a") as file:
        file.write('{"fingerprint": "b", "n')
    assert read_lines(path) == {"a": {"fingerprint": "a", "n": 1}}
    append_line(path, {"fingerprint": "c"})
    assert list(read_lines(path)) == ["a", "c"]


def test_the_newest_line_counts(tmp_path: Path) -> None:
    for n in (1, 2):
        append_line(tmp_path / LINES, {"fingerprint": "a", "n": n})
    assert read_lines(tmp_path / LINES)["a"]["n"] == 2
    assert read_lines(tmp_path / "none") == {}


@pytest.mark.parametrize("text", ["{]\n", "[1]\n", '{"n": 1}\n'])
def test_a_line_that_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / LINES
    append_line(path, {"fingerprint": "a"})
    with open(path, "a") as file:
        file.write(text)
    with pytest.raises(UserError, match="line 2 is not the record of a run"):
        read_lines(path)


# ---------------------------------------------------------------------- stopping


def test_stopped_and_continued_it_ends_as_if_it_had_not_been(
    write: Any, data_path: Path, tmp_path: Path
) -> None:
    """SIGTERM in the midst of a run; the same command goes on with it, to the last bit."""
    path = write(rows={"SimDiffRec": {}}, seeds=[1])
    values = {k: v for k, v in tiny("SimDiffRec").items() if k != "load_col"} | {
        "data_path": str(data_path)
    }

    def command(folder: str) -> list[str]:
        options = values | {"checkpoint_dir": str(tmp_path / folder), "epochs": 100}
        options |= {
            "stopping_step": 999,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        }
        given = [f"--{k}={json.dumps(v)}" for k, v in options.items()]
        given += [f"--output={tmp_path / folder / 'results'}"]
        return [sys.executable, "-m", "recbole_simdiff", "ablate", path, *given]

    process = subprocess.Popen(command("broken"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "broken"
    deadline = time.monotonic() + 120
    while not any("epoch   5" in p.read_text() for p in log.rglob("*.log")):
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate()[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "the same command" in text
    assert not list(log.rglob(RESULT))
    assert list(log.rglob(LAST))

    for folder in ("broken", "whole"):
        finished = subprocess.run(command(folder), capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
    (broken,), (whole,) = (
        read_lines(tmp_path / folder / "results" / "parts" / LINES).values()
        for folder in ("broken", "whole")
    )
    assert "resumed at epoch" in next(log.rglob("*.log")).read_text()
    assert broken["epochs"] == 100
    assert broken["test"] == whole["test"]
    assert [e["loss"] for e in broken["log"]] == [e["loss"] for e in whole["log"]]


def test_the_content_of_the_fixture_is_what_the_tests_assume() -> None:
    assert CONTENT["seeds"] == [1, 2]
    assert list(CONTENT["rows"]) == ["SimDiffRec", "w/o both"]
