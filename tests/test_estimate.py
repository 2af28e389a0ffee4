"""What a training will cost, before it starts."""

from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.cli.main import main
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.runs import estimate as module
from recbole_simdiff.runs.estimate import (
    Estimate,
    FirstEstimate,
    PhaseEstimate,
    epoch_seconds,
    estimate,
    step_seconds,
)
from recbole_simdiff.runs.run import run_one
from recbole_simdiff.training.progress import Progress


def arguments(data_path: Path, tmp_path: Path) -> list[str]:
    places = [f"--data_path={data_path}", f"--checkpoint_dir={tmp_path / 'saved'}"]
    return ["--dataset=toy", "--use_gpu=False", "--topk=[1,5]", "--valid_metric=NDCG@5", *places]


@pytest.mark.parametrize("model", ["SASRecCE", "GRU4Rec", "DreamRec", "Pop", "MCLRec"])
def test_an_estimate_has_the_steps_and_epochs_of_the_run(make_config: Any, model: str) -> None:
    config = make_config(model, eval_step=2) if model != "Pop" else make_config(model)
    found = estimate(config, steps=2)
    result = run_one(config)
    n_epochs = sum(phase.epochs for phase in found.phases)
    assert n_epochs >= result.epochs
    assert all(phase.step_seconds > 0 for phase in found.phases)
    if model == "Pop":
        assert found.phases[0].steps == 1
    else:
        assert found.phases[0].validations == 0.5
    assert found.memory_mb > 10
    assert found.gpu_memory_mb == 0


def test_epochs_of_a_former_run_count(make_config: Any) -> None:
    source = run_one(make_config("SASRecCE", epochs=2)).run_dir
    given = {"eval_args": {"split": {"LS": "test_only"}}, "epochs_from": source, "epochs": 50}
    config = make_config("SASRecCE", **given)
    (phase,) = estimate(config, steps=1).phases
    assert phase.epochs == run_one(config).epochs


def test_nothing_is_kept(make_config: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    estimate(make_config("SASRecCE"), steps=1)
    written = {path for path in set(tmp_path.rglob("*")) - set(before) if path.is_file()}
    assert not [path for path in written if "log_tensorboard" not in path.parts]


def test_a_step_that_was_held_up_does_not_count() -> None:
    """Medians of (1, 2, 90), (4, 5, 6) and (8,)."""
    assert step_seconds([1.0, 2.0, 90.0, 4.0, 6.0, 5.0, 8.0]) == 5.0


def test_the_sum_by_hand() -> None:
    phases = [PhaseEstimate("a", 3, 10, 0.5, 0.0), PhaseEstimate("b", 2, 4, 1.0, 0.5)]
    found = Estimate(1, 0.0, 6.0, 0.0, phases, 1.0, 0.0)
    assert found.epoch_seconds(phases[0]) == 5.0
    assert found.epoch_seconds(phases[1]) == 7.0
    assert found.seconds == 3 * 5.0 + 2 * 7.0


def told(run_dir: str) -> list[str]:
    """The estimates in the log of a run."""
    (path,) = Path(run_dir).glob("*.log")
    return [line for line in path.read_text().splitlines() if line.startswith("estimate: ")]


def test_the_first_run_on_a_data_set_tells_its_cost(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its own steps: what is trained is the same."""
    monkeypatch.setattr(module, "WORTH_TELLING", 0.0)
    monkeypatch.setattr(module, "SOON", 0.0)
    monkeypatch.setattr(module, "LATEST", 0.0)
    small = {"epochs": 3, "train_batch_size": 1}
    first, second = (run_one(make_config("SASRecCE", **small)) for _ in range(2))
    by_steps, by_epoch = told(first.run_dir)
    assert " an epoch without validation: 7 steps of " in by_steps
    assert " an epoch and its validation; peak memory " in by_epoch
    assert "at most 3 epochs, " in by_epoch
    assert told(second.run_dir) == []
    assert (first.valid, first.test) == (second.valid, second.test)
    assert told(run_one(make_config("Pop")).run_dir) == []  # nothing is left to come


def test_short_trainings_tell_nothing(make_config: Any) -> None:
    assert told(run_one(make_config("SASRecCE")).run_dir) == []


def test_the_first_steps_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three of 100 s, then half a second each: 200 steps are 100 s, 10 epochs 1000 s."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    listener, progress = FirstEstimate([Phase("a", 10), Phase("b", 9)], [1] * 200), Progress()
    with caplog.at_level("INFO"):
        for seconds in [100.0] * 3 + [0.5] * 13:
            now, progress.step = now + seconds, progress.step + 1
            listener.on_step(progress)
    (line,) = caplog.messages
    assert line.startswith(
        "estimate: 100.0 s an epoch without validation: 200 steps of 0.500 s; at most 10 epochs of "
        "phase a, 16.7 min; "
    )


def test_long_rows_cost_more() -> None:
    """Steps of 1 s and 2 s a token, of which only some of the short ones were taken."""
    sizes = [9, 1, 2, 4, 100, 4]
    times = [1.0 + 2 * size for size in sizes]
    assert epoch_seconds(times[1:4], sizes, 1) == pytest.approx(sum(times))
    assert epoch_seconds([3.0, 3.0], [5, 5, 7], 0) == 9.0  # of one size: all alike
    assert epoch_seconds([4.0, 2.0], [1, 3, 8], 0) == 9.0  # no faster for more tokens
    assert epoch_seconds([1.0, 6.0], [2, 4, 6], 0) == pytest.approx(7 / 6 * 12)  # nothing is free


@pytest.mark.parametrize("name", ["toy", "toy-2"])
def test_runs_of_another_data_set_tell_nothing_of_this(
    make_config: Any, tmp_path: Path, name: str
) -> None:
    """Though its name may begin in the same way."""
    here = tmp_path / "runs" / "SASRecCE-toy-20260101-000000-abcd"
    here.mkdir(parents=True)
    (here.parent / f"SASRecCE-{name}-20260101-000000-0000").mkdir()
    assert FirstEstimate.is_due(make_config("SASRecCE"), here) == (name != "toy")


def test_the_command(data_path: Path, tmp_path: Path, capsys: Any) -> None:
    given = arguments(data_path, tmp_path)
    assert main(["estimate", "--model=SASRecCE", "--epochs=7", "--steps=2", *given]) == 0
    out = capsys.readouterr().out
    assert "SASRecCE on toy:" in out
    assert "at most 7 epochs" in out
    assert "peak memory:" in out
    assert not (tmp_path / "saved").exists()
    assert main(["estimate", "--model=SASRecCE", "--steps=0", *given]) == 2
    assert "steps=0 must be at least 1" in capsys.readouterr().err
    assert main(["estimate", "--model=DiffuASR", "--backbone=GRU4Rec", *given]) == 2
    assert "estimate its backbone, --model=GRU4Rec" in capsys.readouterr().err
