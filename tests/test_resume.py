"""A run that was stopped anywhere and resumed ends exactly as one that was not."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.modules.random_state import random_states
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training import progress as progress_module
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES, write_inter

SCRIPT = Path(__file__).resolve().parent.parent / "run_recbole_simdiff.py"
# Four steps an epoch and three validation batches on toy, all three losses on.
STEPS = 4
SMALL_STEPS = {"train_batch_size": 2, "eval_batch_size": 2, "epochs": 3, "stopping_step": 99}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Crash(Exception):
    """Stands for a power cut: nothing is saved."""


Hook = Callable[[int], None]


def nothing(_: int) -> None:
    """A hook that lets the run go on."""


def at(count: int, act: Callable[[], None]) -> Hook:
    """A hook that acts at call number ``count``, counted from 1."""
    return lambda calls: act() if calls == count else None


def interrupt() -> None:
    """Ctrl-C, as the operating system delivers it."""
    os.kill(os.getpid(), signal.SIGINT)


def crash() -> None:
    raise Crash


def train(
    config: Config,
    run_dir: Path,
    on_step: Hook = nothing,
    on_scores: Hook = nothing,
    resume: bool = False,
) -> dict[str, Any]:
    """Train in ``run_dir``; everything that must be equal at the end.

    The hooks get the number of the training step that is about to start, or of the batch that is
    about to be scored.
    """
    _, train_data, valid_data, test_data, model = build_run(config)
    if resume:  # a new process is in another state than the old one
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
    calls = {"calculate_loss": 0, "full_sort_predict": 0}

    def hooked(name: str, hook: Hook) -> Any:
        stock = getattr(model, name)

        def call(batch: Any) -> Any:
            calls[name] += 1
            hook(calls[name])
            return stock(batch)

        return call

    model.calculate_loss = hooked("calculate_loss", on_step)
    model.full_sort_predict = hooked("full_sort_predict", on_scores)
    trainer = PlanTrainer(config, model, run_dir)
    if resume:
        trainer.resume(run_dir / LAST)
    progress = trainer.fit(train_data, valid_data)
    optimizer = trainer.optimizer.state_dict()
    states = random_states()
    log = [{k: v for k, v in e.items() if k != "seconds"} for e in progress.log]
    return {
        "weights": model.state_dict(),
        "best": checkpoint.subset(checkpoint.load(run_dir / BEST)[0], "model"),
        "moments": {
            f"{i}.{k}": torch.as_tensor(v)
            for i, slots in optimizer["state"].items()
            for k, v in slots.items()
        },
        "groups": json.dumps(optimizer["param_groups"]),
        "rng": {k: v for k, v in states.items() if not torch.is_floating_point(v)},
        "progress": (progress.best_score, progress.best_epoch, progress.misses, log),
        "test": trainer.evaluator.evaluate(test_data),
    }


def assert_identical(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Bit for bit."""
    assert found.keys() == wanted.keys()
    for part, value in wanted.items():
        if part in ("weights", "best", "moments", "rng"):
            assert found[part].keys() == value.keys()
            for name, tensor in value.items():
                assert torch.equal(found[part][name], tensor), (part, name)
        else:
            assert found[part] == value, part


@pytest.fixture
def stop_and_go(make_config: Any, tmp_path: Path) -> Any:
    """stop_and_go(model, error, hooks..., **overrides): unbroken against stopped and resumed."""

    def check(
        model: str, error: type, on_step: Hook = nothing, on_scores: Hook = nothing, **changes: Any
    ) -> dict[str, Any]:
        config = make_config(model, **(SMALL_STEPS | changes))
        wanted = train(config, tmp_path / "unbroken")
        with pytest.raises(error):
            train(config, tmp_path / "stopped", on_step, on_scores)
        stopped: dict[str, Any] = checkpoint.load(tmp_path / "stopped" / LAST)[1]["progress"]
        assert_identical(train(config, tmp_path / "stopped", resume=True), wanted)
        return stopped

    return check


# ---------------------------------------------------------------------- within a process


def test_the_comparison_notices_a_difference(make_config: Any, tmp_path: Path) -> None:
    """What the other tests call identical is not so for another seed."""
    config = make_config(**SMALL_STEPS)
    wanted = train(config, tmp_path / "a")
    assert len(wanted["progress"][-1]) == 3
    losses = wanted["progress"][-1][0]["loss"]
    assert all(losses[name] > 0 for name in ("rec", "contrastive", "diffusion"))
    assert_identical(train(config, tmp_path / "b"), wanted)
    other = train(make_config(**SMALL_STEPS, seed=7), tmp_path / "c")
    with pytest.raises(AssertionError):
        assert_identical(other, wanted)


@pytest.mark.parametrize(
    ("step", "stands_at"),
    [
        pytest.param(1, (0, 1), id="first step"),
        pytest.param(2, (0, 2), id="mid-epoch"),
        pytest.param(STEPS, (0, STEPS), id="last step of an epoch"),
        pytest.param(STEPS + 1, (1, 1), id="first step of the next epoch"),
        pytest.param(3 * STEPS - 1, (2, 3), id="last epoch"),
        pytest.param(3 * STEPS, (2, STEPS), id="very last step"),
    ],
)
def test_interrupted_in_a_step(stop_and_go: Any, step: int, stands_at: tuple[int, int]) -> None:
    """The step that runs is finished; the next one is the first of the resumed run."""
    progress = stop_and_go("SimDiffRec", Interrupted, at(step, interrupt))
    assert (progress["epoch"], progress["step"]) == stands_at


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS])
def test_neighbours_of_an_epoch_outlast_a_stop(stop_and_go: Any, step: int) -> None:
    """They are those of the table when the epoch began, which a checkpoint no longer holds."""
    stop_and_go("SimDiffRec", Interrupted, at(step, interrupt), noise_refresh="epoch")


def test_seconds_of_all_parts_count(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves by one with each training step."""
    clock = [0]

    def tick(_: int) -> None:
        clock[0] += 1

    def stop_in_the_second_epoch(call: int) -> None:
        tick(call)
        at(STEPS + 2, interrupt)(call)

    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    config = make_config(**SMALL_STEPS)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", stop_in_the_second_epoch)
    train(config, tmp_path / "run", tick, resume=True)
    progress = checkpoint.load(tmp_path / "run" / LAST)[1]["progress"]
    assert progress["seconds"] == 3 * STEPS
    assert [entry["seconds"] for entry in progress["log"]] == [STEPS] * 3


@pytest.mark.parametrize(
    ("batch", "epoch"),
    [
        pytest.param(1, 0, id="first batch"),
        pytest.param(3, 1, id="second validation"),
        pytest.param(5, 2, id="last validation"),
    ],
)
def test_interrupted_during_validation(stop_and_go: Any, batch: int, epoch: int) -> None:
    """The epoch's training is kept and its validation starts again."""
    progress = stop_and_go("SimDiffRec", Interrupted, on_scores=at(batch, interrupt))
    assert (progress["epoch"], progress["step"]) == (epoch, STEPS)


@pytest.mark.parametrize(
    ("step", "batch", "epoch"),
    [
        pytest.param(1, 0, 0, id="before anything was learnt"),
        pytest.param(STEPS, 0, 0, id="in the first epoch"),
        pytest.param(STEPS + 1, 0, 1, id="after an epoch"),
        pytest.param(0, 4, 1, id="in a validation"),
        pytest.param(3 * STEPS, 0, 2, id="in the last epoch"),
    ],
)
def test_crashed(stop_and_go: Any, step: int, batch: int, epoch: int) -> None:
    """A killed run goes back to the end of its last whole epoch."""
    progress = stop_and_go("SimDiffRec", Crash, at(step, crash), at(batch, crash))
    assert (progress["epoch"], progress["step"]) == (epoch, 0)


def test_interrupted_twice(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**SMALL_STEPS)
    wanted = train(config, tmp_path / "unbroken")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", at(2, interrupt))
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", at(1, interrupt), resume=True)
    assert checkpoint.load(tmp_path / "stopped" / LAST)[1]["progress"]["step"] == 3
    assert_identical(train(config, tmp_path / "stopped", resume=True), wanted)


@pytest.mark.parametrize("model", ["SASRec", "BERT4Rec", "GRU4Rec", "FPMC"])
@pytest.mark.parametrize("step", [2, 5])
def test_recboles_models_resume_too(stop_and_go: Any, model: str, step: int) -> None:
    """BERT4Rec masks items in its loader with Python's random numbers; FPMC draws negatives."""
    masks = {"MAX_ITEM_LIST_LENGTH": 8, "mask_ratio": 0.9} if model == "BERT4Rec" else {}
    stop_and_go(model, Interrupted, at(step, interrupt), train_batch_size=4, **masks)


def test_recboles_models_resume_from_a_crash(stop_and_go: Any) -> None:
    masks = {"MAX_ITEM_LIST_LENGTH": 8, "mask_ratio": 0.9}
    stop_and_go("BERT4Rec", Crash, at(7, crash), train_batch_size=4, **masks)


@pytest.mark.parametrize("learner", ["adamw", "sgd", "rmsprop", "adagrad"])
def test_every_optimiser_resumes(stop_and_go: Any, learner: str) -> None:
    stop_and_go("SimDiffRec", Interrupted, at(6, interrupt), learner=learner)


def test_early_stopping_counts_on(make_config: Any, tmp_path: Path) -> None:
    """With a rate too small to change any rank, the first epoch stays the best."""
    changes = SMALL_STEPS | {"stopping_step": 2, "stopping_updates": 0}
    changes |= {"epochs": 9, "learning_rate": 1e-12}
    config = make_config(**changes)
    wanted = train(config, tmp_path / "unbroken")
    assert len(wanted["progress"][-1]) == 3
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", at(2 * STEPS + 1, interrupt))
    assert checkpoint.load(tmp_path / "stopped" / LAST)[1]["progress"]["misses"] == 1
    assert_identical(train(config, tmp_path / "stopped", resume=True), wanted)


def test_an_epoch_that_was_begun_is_ended(make_config: Any, tmp_path: Path) -> None:
    """Patience runs out between epochs, not at the update at which a run is resumed."""
    changes = SMALL_STEPS | {"stopping_step": 1, "stopping_updates": STEPS + 2}
    config = make_config(**changes | {"epochs": 9, "learning_rate": 1e-12})
    wanted = train(config, tmp_path / "unbroken")
    assert len(wanted["progress"][-1]) == 3
    with pytest.raises(Interrupted):
        train(config, tmp_path / "stopped", at(3 * STEPS - 1, interrupt))
    assert checkpoint.load(tmp_path / "stopped" / LAST)[1]["progress"]["idle_updates"] > STEPS + 2
    assert_identical(train(config, tmp_path / "stopped", resume=True), wanted)


def test_a_second_signal_is_final(make_config: Any, tmp_path: Path) -> None:
    """The first asks; whoever presses Ctrl-C again does not want to wait."""

    def twice() -> None:
        interrupt()
        interrupt()

    # Python's own handler: a worker process of a test runner may ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_config(**SMALL_STEPS), tmp_path / "run", at(2, twice))
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_put_back(make_config: Any, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted):
        train(make_config(**SMALL_STEPS), tmp_path / "run", at(1, interrupt))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---------------------------------------------------------------------- two phases


def test_s3rec_runs_both_phases_and_resumes_in_the_second(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """RecBole needs two programs for this. Items carry their genre, which ships with ml-100k."""
    small = {
        "pretrain_epochs": 1,
        "epochs": 2,
        "MAX_ITEM_LIST_LENGTH": 5,
        "hidden_size": 8,
        "inner_size": 8,
        "n_layers": 1,
        "train_batch_size": 2048,
        "user_inter_num_interval": "[300,inf)",
        "item_inter_num_interval": "[5,inf)",
        "use_gpu": False,
        "show_progress": False,
        "checkpoint_dir": str(tmp_path / "saved"),
    }
    config = Config("S3Rec", "ml-100k", overrides=small)
    with caplog.at_level("INFO"):
        wanted = train(config, tmp_path / "unbroken")
    assert "phases: pretrain (at most 1 epochs), finetune (at most 2 epochs)" in caplog.messages
    log = wanted["progress"][-1]
    assert [(e["phase"], e["epoch"], "valid" in e) for e in log] == [
        ("pretrain", 0, False),
        ("finetune", 0, True),
        ("finetune", 1, True),
    ]
    # The second stage is a softmax over some 1,000 items; the first sums over all positions.
    pretrain, finetune = (log[number]["loss"]["loss"] for number in (0, 1))
    assert pretrain > 1000
    assert finetune < math.log(2000)
    with pytest.raises(Interrupted):
        # validation batches come in the second phase only
        train(config, tmp_path / "stopped", on_scores=at(1, interrupt))
    assert checkpoint.load(tmp_path / "stopped" / LAST)[1]["progress"]["phase"] == 1
    assert_identical(train(config, tmp_path / "stopped", resume=True), wanted)


def test_s3rec_without_pre_training_has_the_loss_of_its_second_stage(tmp_path: Path) -> None:
    small = {
        "pretrain_epochs": 0,
        "epochs": 1,
        "MAX_ITEM_LIST_LENGTH": 5,
        "hidden_size": 8,
        "inner_size": 8,
        "n_layers": 1,
        "train_batch_size": 2048,
        "user_inter_num_interval": "[300,inf)",
        "use_gpu": False,
        "show_progress": False,
    }
    for loss_type, chance in (("CE", math.log(1349)), ("BPR", math.log(2))):
        config = Config("S3Rec", "ml-100k", overrides=small | {"loss_type": loss_type})
        (entry,) = train(config, tmp_path / loss_type)["progress"][-1]
        assert (entry["phase"], "valid" in entry) == ("finetune", True)
        assert entry["loss"]["loss"] == pytest.approx(chance, rel=0.1)


# ---------------------------------------------------------------------- what may change


def test_more_epochs_continue_a_finished_run(make_config: Any, tmp_path: Path) -> None:
    wanted = train(make_config(**SMALL_STEPS), tmp_path / "unbroken")
    train(make_config(**SMALL_STEPS | {"epochs": 1}), tmp_path / "short")
    assert_identical(train(make_config(**SMALL_STEPS), tmp_path / "short", resume=True), wanted)


@pytest.fixture
def finished(make_config: Any) -> Path:
    """Folder of a finished run of one epoch on toy."""
    return Path(run(make_config(**SMALL_STEPS | {"epochs": 1})).run_dir)


@pytest.mark.parametrize(
    "change", ["learning_rate=0.1", "seed=1", "train_batch_size=8", "hidden_size=16", "tau=1.0"]
)
def test_keys_that_shape_the_numbers_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    assert main([f"--resume={finished}", f"--{change}"]) == 2
    key = change.partition("=")[0]
    error = capsys.readouterr().err
    assert f"{key} cannot be changed here: the checkpoint fixes it. Allowed: epochs" in error


@pytest.mark.parametrize("argument", ["--model=SASRec", "--dataset=ml-100k"])
def test_another_model_or_data_set_is_not_silently_ignored(
    finished: Path, capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    assert main([f"--resume={finished}", argument]) == 2
    assert argument.partition("=")[0] in capsys.readouterr().err


def test_resuming_a_finished_run_prints_it_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((finished / RESULT).read_text())
    assert main([f"--resume={finished}"]) == 0
    after = json.loads((finished / RESULT).read_text())
    assert after["epochs"] == 1
    assert [after[key] for key in ("valid", "test")] == [before[key] for key in ("valid", "test")]
    assert "history removed" in capsys.readouterr().out


def test_more_epochs_on_the_command_line(finished: Path) -> None:
    assert main([f"--resume={finished / LAST}", "--epochs=2"]) == 0
    assert json.loads((finished / RESULT).read_text())["epochs"] == 2


def test_the_best_checkpoint_cannot_be_resumed(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the data are read and the log of the run is opened."""
    monkeypatch.setattr(sys.modules[run.__module__], "build_run", None)
    (log,) = finished.glob("*.log")
    log.unlink()
    assert main([f"--resume={finished / BEST}"]) == 2
    error = capsys.readouterr().err
    assert "best.safetensors cannot be resumed from; use the run's last.safetensors" in error
    assert not log.exists()


def test_a_missing_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--resume={tmp_path / 'gone'}"]) == 2
    assert re.search(r"no checkpoint at .*gone; give a run folder", capsys.readouterr().err)


CHANGED = {
    "other items": {"a": ["j1", "j2", "j3", "j4", "j5"], "b": ["j2", "j3", "j5", "j1", "j4"]},
    "other order": None,
}


@pytest.mark.parametrize("change", CHANGED)
def test_other_data_are_refused(
    make_config: Any, data_path: Path, tmp_path: Path, change: str
) -> None:
    """Equal ids are not enough: one swapped event changes every later number."""
    config = make_config(**SMALL_STEPS | {"epochs": 1})
    last = Path(run(config).run_dir) / LAST
    sequences = CHANGED[change]
    path = data_path / "toy" / "toy.inter"
    if sequences is None:
        # The last two events of user c trade places; all ids keep their order of appearance.
        text = path.read_text()
        assert "c\ti12\t5\nc\ti1\t6\n" in text
        path.write_text(text.replace("c\ti12\t5\nc\ti1\t6\n", "c\ti12\t6\nc\ti1\t5\n"))
    else:
        write_inter(data_path, "toy", sequences)
    (log,) = last.parent.glob("*.log")
    before = log.read_text()
    with pytest.raises(UserError, match=r"is not the one .* was trained on"):
        run(make_config(**SMALL_STEPS | {"epochs": 2, "k_noise": 1}), last)
    assert log.read_text() == before


# ---------------------------------------------------------------------- the program

LONG = {
    "train_batch_size": 2,
    "eval_batch_size": 2,
    "epochs": 30,
    "stopping_step": 99,
    "topk": [1, 5],
    "valid_metric": "NDCG@5",
    "MAX_ITEM_LIST_LENGTH": 4,
    "hidden_size": 8,
    "inner_size": 16,
    "k_noise": 3,
    "reverse_steps": 4,
    "use_gpu": False,
    "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


def start(*arguments: str, code: str | None = None) -> subprocess.Popen[str]:
    """The program in a process of its own, its log readable line by line."""
    program = ["-c", code] if code else [str(SCRIPT)]
    return subprocess.Popen(
        [sys.executable, "-u", *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read the log until a line holds ``text``."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("the program ended before it logged " + text + "\n" + "".join(lines))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The unbroken run, with the command line that repeats it in a given folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_inter(folder / "dataset", "toy", SEQUENCES)
    values = LONG | {"data_path": str(folder / "dataset")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(Config("SimDiffRec", "toy", overrides=values | {"checkpoint_dir": "saved"}))
    return {
        "run_dir": folder / result.run_dir,
        "arguments": ["--dataset=toy", *(f"--{key}={value}" for key, value in values.items())],
    }


def assert_same_run(found: Path, wanted: Path) -> None:
    """The best epoch's weights, and all metrics of result.json."""
    ours, theirs = (checkpoint.load(folder / BEST)[0] for folder in (found, wanted))
    names = {name for name in theirs if name.startswith("model.")}
    assert names
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    ours, theirs = (json.loads((folder / RESULT).read_text()) for folder in (found, wanted))
    for key in ("valid", "test", "best_epoch", "epochs"):
        assert ours[key] == theirs[key], key
    for mine, other in zip(ours["log"], theirs["log"], strict=True):
        assert (mine["loss"], mine["valid"]) == (other["loss"], other["valid"])


def only_run(folder: Path) -> Path:
    """The one run folder below ``folder``."""
    (place,) = (path.parent for path in folder.glob(f"*/{LAST}"))
    return place


def test_killed_and_resumed(unbroken: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL cannot be caught: the checkpoint on disk must do."""
    process = start(*unbroken["arguments"], f"--checkpoint_dir={tmp_path / 'saved'}")
    wait_for(process, "train epoch   7")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    place = only_run(tmp_path / "saved")
    assert not (place / RESULT).exists()
    assert main([f"--resume={place}"]) == 0
    assert_same_run(place, unbroken["run_dir"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_by_a_signal_and_resumed(
    unbroken: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    process = start(*unbroken["arguments"], f"--checkpoint_dir={tmp_path / 'saved'}")
    wait_for(process, "train epoch   3")
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    place = only_run(tmp_path / "saved")
    assert f"stopped by {number.name}; everything is saved." in error
    assert f"run_recbole_simdiff.py --resume={place}" in error
    assert not list(place.glob("*.tmp"))
    assert main([f"--resume={place}"]) == 0
    assert_same_run(place, unbroken["run_dir"])


# Signals the process itself when the test part is about to be scored, after the last epoch.
LATE = """
import os, signal, sys
import recbole_simdiff.runs.run
from recbole_simdiff.cli.main import main
run = sys.modules["recbole_simdiff.runs.run"]
stock = run.evaluate_splits
def late(*arguments):
    os.kill(os.getpid(), signal.{name})
    return stock(*arguments)
run.evaluate_splits = late
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_during_the_final_test(
    unbroken: dict[str, Any], tmp_path: Path, number: signal.Signals
) -> None:
    """Training is over but the numbers are not out: stopping is still orderly."""
    place = tmp_path / "saved" / "run"
    shutil.copytree(unbroken["run_dir"], place)
    (place / RESULT).unlink()
    process = start(f"--resume={place}", code=LATE.format(name=number.name))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    assert f"--resume={place}" in error
    # The best epoch's weights were in the model; they must not replace the last epoch's on disk.
    ours, theirs = (checkpoint.load(folder / LAST)[0] for folder in (place, unbroken["run_dir"]))
    trained = [name for name in theirs if name.startswith(("model.", "optimizer."))]
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    assert main([f"--resume={place}"]) == 0
    assert_same_run(place, unbroken["run_dir"])


def test_the_message_names_this_run_and_not_a_newer_one(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Parallel runs share the folder, and the other one may have saved last."""
    other = tmp_path / "saved" / "SimDiffRec-toy-20990101-000000-beef"
    other.mkdir(parents=True)
    (other / LAST).write_bytes(b"")
    os.utime(other / LAST, (4e9, 4e9))
    config = make_config(**SMALL_STEPS)
    monkeypatch.setattr("recbole_simdiff.cli.settings.Config", lambda *_: config)
    stock = config.model_class.calculate_loss

    def calculate_loss(self: Any, batch: Any) -> Any:
        interrupt()
        return stock(self, batch)

    monkeypatch.setattr(config.model_class, "calculate_loss", calculate_loss)
    assert main(["--dataset=toy"]) == 130
    error = capsys.readouterr().err
    assert str(other) not in error
    assert "--resume=" in error
