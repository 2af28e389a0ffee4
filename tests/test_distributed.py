"""Training by two processes: it ends where one process ends, and stops and resumes as one does.

This file is also the program of the two processes: torchrun starts it once, both write what they
found, and the tests read it and compare it with what one process finds.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recbole_simdiff import checkpoint, distributed, files
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.errors import Interrupted, ProcessLost, UserError
from recbole_simdiff.evaluation.rankings import RANKS
from recbole_simdiff.models.registry import plugin_models
from recbole_simdiff.modules.fitted import FittedModel
from recbole_simdiff.runs.build import build_run
from recbole_simdiff.runs.processes import check_processes, explained_loss
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.state import Resumed
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES, SMALL, write_inter
from tests.test_resume import LONG, only_run, start, wait_for

ROOT = Path(__file__).resolve().parent.parent
# Batches of odd sizes: 7 windows (SimDiffRec by default) or 13 prefixes are trained on. The 4 rows
# of validation are scored in batches of 3 and 1, of which process 1 has none, 5 of test in 3 and 2.
DIVIDED = {"train_batch_size": 5, "eval_batch_size": 3, "eval_step": 1, "stopping_step": 99}
# Every way in which a loss is divided.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, model in plugin_models().items() if model.data_parallel},
    "SimDiffRec, next item only": ("SimDiffRec", {"cl_weight": 0, "diff_weight": 0}),
    "SimDiffRec, released": ("SimDiffRec", {"preset": "official"}),
    "SimDiffRec, prefixes": ("SimDiffRec", {"train_sampling": "prefix_last"}),
    "SimDiffRec, every state": ("SimDiffRec", {"contrast_at": "every"}),
    "SimDiffRec, balanced": ("SimDiffRec", {"cl_balance": 0.3, "train_sampling": "prefix_last"}),
    "SimDiffRec, balanced states": ("SimDiffRec", {"cl_balance": 0.3, "contrast_at": "every"}),
    "SimDiffRec, same target": (
        "SimDiffRec",
        {"contrast_at": "every", "cl_positives": "same_target", "cl_negatives": "pos_only"},
    ),
    "CaDiRec, by row": ("CaDiRec", {"nll_reduction": "sequence"}),
    "DuoRec, us": ("DuoRec", {"contrast": "us"}),
    "MCLRec, by row": ("MCLRec", {"regularizer": "row", "encoder_steps": 2}),
}


def make(folder: Path, model: str, **changes: Any) -> Config:
    """A small configuration on toy; every loss of the model has a weight."""
    values = dict(SMALL) | DIVIDED
    values |= {"data_path": str(folder / "dataset"), "checkpoint_dir": str(folder / "saved")}
    known = Config(model, "toy").final_config_dict
    weights = [
        key for key in read_yaml(properties_dir() / f"model/{model}.yaml") if "weight" in key
    ]
    values |= {key: known[key] or 0.1 for key in weights}
    return Config(model, "toy", overrides={k: v for k, v in values.items() if k in known} | changes)


@contextmanager
def constant_draws() -> Iterator[None]:
    """Within the block every random number is the same one, so that rows do not share a stream."""

    def randint(low: int, high: Any, size: Any = None, **other: Any) -> Tensor:
        low, high, size = (0, low, high) if size is None else (low, high, size)
        return torch.full(size, low + (high - low) // 3, **other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, **other: torch.zeros(*size, **other) + 0.3)
        patch.setattr(torch, "randn", lambda *size, **other: torch.zeros(*size, **other) + 0.3)
        patch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.3))
        patch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
        patch.setattr(torch, "randint", randint)
        yield


def fitted(folder: Path, model: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and mean losses of two epochs without chance.

    Plain gradient descent: Adam takes a full step also where a gradient is nothing but rounding.
    Weights decay, unless they have no gradient.
    """
    plain = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "denoiser_dropout": 0.0}
    plain |= {"learner": "sgd", "learning_rate": 0.5, "weight_decay": 0.1, "sr_loss": "CE"}
    known = Config(model, "toy").final_config_dict
    plain = {key: value for key, value in plain.items() if key in known}
    config = make(folder, model, **plain | {"clip_grad_norm": {"max_norm": 1.0}} | changes)
    _, train, valid, _, network = build_run(config)
    name = f"{model}{sorted(changes.items())}".replace("/", " ")
    trainer = PlanTrainer(config, network, folder / "fitted" / name)
    with constant_draws():
        progress = trainer.fit(train, valid)
    found = {f"weight {k}": v for k, v in network.state_dict().items()}
    for entry in progress.log:
        losses = entry["loss"] | entry["valid"]
        found |= {f"{k} {entry['epoch']}": torch.tensor(v) for k, v in losses.items()}
    return found


# ---------------------------------------------------------------------- the two processes


def program(folder: Path) -> None:
    """What both processes do; each writes to its own files."""
    number = distributed.rank()
    for case, (model, changes) in CASES.items():
        save_file(fitted(folder, model, changes), folder / f"{case} {number}.safetensors")

    scored: list[list[int]] = []
    network = plugin_models()["SimDiffRec"]
    stock = network.full_sort_predict
    epochs = {"learner": "sgd", "epochs": 2, "save_rankings": True}
    with pytest.MonkeyPatch.context() as patch:

        def score(self: Any, batch: Any) -> Tensor:
            scored.append(batch["user_id"].tolist())
            return stock(self, batch)

        patch.setattr(network, "full_sort_predict", score)
        with constant_draws():
            plain = make(folder, "SimDiffRec", **epochs, **NO_DROPOUT)
            result = run(plain, run_dir=folder / "pair")
    write(folder / f"scored {number}.json", scored)
    write(folder / f"result {number}.json", [result.valid, result.test, result.by_length])

    # With chance, and stopped by a signal that only one process gets.
    config = make(folder, "SimDiffRec", epochs=3)
    unbroken = run(config)
    write(folder / f"folder {number}.json", unbroken.run_dir)
    with hooked(network, 3, number == 1), pytest.raises(Interrupted) as stop:
        run(config, run_dir=folder / "stopped")
    write(folder / f"signal {number}.json", stop.value.signum)
    progress = checkpoint.load(folder / "stopped" / LAST)[1]["progress"]
    write(folder / f"progress {number}.json", [progress["epoch"], progress["step"]])
    run(config, folder / "stopped" / LAST)

    # Often all noised positions are those of one process, and the other has no diffusion loss.
    few = {"aug_mask": "shared", "aug_ratio": 0.2, "epochs": 8}
    run(make(folder, "CaDiRec", **few), run_dir=folder / "few")
    bf16 = {"enable_amp": True, "epochs": 16, "learning_rate": 0.01}
    run(make(folder, "SimDiffRec", **bf16), run_dir=folder / "bf16")
    for name in ("few", "bf16", "pair", "stopped"):
        digest = files.digest(checkpoint.subset(checkpoint.load(folder / name / BEST)[0], "model"))
        write(folder / f"{name} {number}.json", digest)

    refused = {}
    for reason, (model, changes) in REFUSED.items():
        seed = {"seed": number} if reason == "other settings" else {}
        with pytest.raises(UserError) as error:
            run(make(folder, model, **changes | seed))
        refused[reason] = str(error.value)
    write(folder / f"refused {number}.json", refused)


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
SAMPLED = {
    "eval_args": {
        "split": {"LS": "valid_and_test"},
        "group_by": "user",
        "order": "TO",
        "mode": "uni3",
    }
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "other settings": ("SimDiffRec", {}),
    "last batch": ("SimDiffRec", {"train_batch_size": 6}),
    "few rows": ("SimDiffRec", {"eval_batch_size": 1}),
    "drawn items": ("SimDiffRec", SAMPLED),
}


@contextmanager
def hooked(network: Any, step: int, here: bool) -> Iterator[None]:
    """In this process, a SIGTERM arrives while training step number ``step`` is computed."""
    stock, calls = network.calculate_loss, []

    def calculate_loss(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if here and len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "calculate_loss", calculate_loss)
        yield


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    distributed.TIMEOUT = timedelta(minutes=1)
    with distributed.group():
        program(Path(sys.argv[1]))
    sys.exit()


# ---------------------------------------------------------------------- what they found


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    """torchrun with these arguments, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def two_hosts(*arguments: str) -> list[subprocess.Popen[str]]:
    """Two torchruns of one process each that know one another by an address alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", place]
    return [torchrun(*nodes, f"--node-rank={number}", *arguments) for number in (0, 1)]


@pytest.fixture(
    scope="module", params=["one host", pytest.param("two hosts", marks=pytest.mark.slow)]
)
def pair(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder that two processes under torchrun have written to, on one host or on two."""
    folder = tmp_path_factory.mktemp("pair")
    write_inter(folder / "dataset", "toy", SEQUENCES)
    program = ["-m", "tests.test_distributed", str(folder)]
    if request.param == "one host":
        started = [torchrun("--standalone", "--nproc-per-node=2", *program)]
    else:
        started = two_hosts(*program)
    for process in started:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    return folder


def both(pair: Path, name: str) -> Any:
    """What the processes wrote, which must be the same."""
    first, second = (json.loads((pair / f"{name} {number}.json").read_text()) for number in (0, 1))
    assert first == second
    return first


def test_two_processes_may_make_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RecBole fails where a folder appears between its look and its making: it is there before."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    config = make(tmp_path, "SimDiffRec")
    network, seen = build_run(config)[-1], []
    monkeypatch.setattr(
        "recbole.trainer.trainer.ensure_dir", lambda path: seen.append(Path(path).is_dir())
    )
    PlanTrainer(config, network, tmp_path / "new" / "run")
    assert seen == [True]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(pair: Path, tmp_path: Path, case: str) -> None:
    """Weights and losses up to rounding, validation metrics exactly."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    wanted = fitted(tmp_path, *CASES[case])
    first, second = (load_file(pair / f"{case} {number}.safetensors") for number in (0, 1))
    assert wanted.keys() == first.keys() == second.keys()
    start = build_run(make(tmp_path, *CASES[case][:1], **CASES[case][1]))[-1].state_dict()
    moved = 0.0
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
        if name.startswith("weight "):
            moved += float((value - start[name.removeprefix("weight ")]).abs().max())
    assert moved > 0.01


def test_metrics_are_those_of_one_process(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    changes = {"learner": "sgd", "epochs": 2, "save_rankings": True}
    with constant_draws():
        one = run(make(tmp_path, "SimDiffRec", **changes, **NO_DROPOUT), run_dir=tmp_path / "one")
    assert both(pair, "result") == [one.valid, one.test, one.by_length]
    assert (pair / "pair" / RANKS).read_text() == (tmp_path / "one" / RANKS).read_text()
    stored = json.loads((pair / "pair" / RESULT).read_text())
    assert (stored["processes"], one.processes) == (2, 1)


def test_each_user_is_scored_once(pair: Path) -> None:
    """Batches of 3, of which process 0 has two rows, and what is left: one row, or two of test."""
    first, second = (json.loads((pair / f"scored {n}.json").read_text()) for n in (0, 1))
    # Two validations in training, one at the end, and the test.
    assert [len(users) for users in first] == [2, 1] * 4
    assert [len(users) for users in second] == [1, 1, 1, 1, 1]
    passes = [first[i] + first[i + 1] + second[i // 2] for i in (0, 2, 4, 6)]
    passes[3] += second[4]
    users = {name: number for number, name in enumerate(SEQUENCES, start=1)}
    for found in passes[:3]:
        assert sorted(found) == sorted(users[name] for name in "abcd")
    assert sorted(passes[3]) == sorted(users[name] for name in "abcde")


def test_one_process_writes(pair: Path) -> None:
    """One checkpoint, one result and one log of a run, whose folder both know."""
    folder = pair / both(pair, "folder")
    assert {path.name for path in folder.iterdir()} == {BEST, LAST, RESULT, f"{folder.name}.log"}
    log = (folder / f"{folder.name}.log").read_text()
    assert log.count("train epoch") == 3
    assert log.count("12 items") == 1


def test_each_process_draws_its_own_numbers(pair: Path) -> None:
    tensors, content = checkpoint.load(pair / "stopped" / LAST)
    assert content["processes"] == 2
    first, second = (checkpoint.subset(tensors, name) for name in ("rng", "rng1"))
    assert first.keys() == second.keys()
    for name in ("torch", "python", "numpy"):
        assert not torch.equal(first[name], second[name]), name


def test_a_signal_to_one_stops_both_at_the_same_step(pair: Path) -> None:
    assert both(pair, "signal") == signal.SIGTERM
    assert both(pair, "progress") == [1, 1]  # two steps an epoch


def test_a_resumed_run_ends_as_an_unbroken_one(pair: Path) -> None:
    """Bit for bit, with dropout, steps and noise drawn by both processes."""
    unbroken = pair / both(pair, "folder")
    for name in (BEST, LAST):
        ours, theirs = (checkpoint.load(place / name)[0] for place in (pair / "stopped", unbroken))
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(ours[key], value) for key, value in theirs.items() if value.isfinite().all()
        )
    ours, theirs = (json.loads((p / RESULT).read_text()) for p in (pair / "stopped", unbroken))
    assert ours["test"] == theirs["test"]
    for mine, other in zip(ours["log"], theirs["log"], strict=True):
        assert (mine["loss"], mine["valid"]) == (other["loss"], other["valid"])


@pytest.mark.parametrize("name", ["few", "bf16"])
def test_models_that_draw_learn(pair: Path, name: str) -> None:
    assert both(pair, name)
    log = json.loads((pair / name / RESULT).read_text())["log"]
    assert log[-1]["loss"]["rec"] < log[0]["loss"]["rec"]


def test_another_number_of_processes_cannot_resume(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--resume={pair / 'stopped'}", "--epochs=4"]) == 2
    error = capsys.readouterr().err
    assert (
        "holds the random states of 2 processes and cannot be resumed by 1; give --nproc=2" in error
    )


def test_another_number_resumes_where_it_is_given(pair: Path, tmp_path: Path) -> None:
    """By random states of its own, the same ones whenever the same number resumes."""
    ends = []
    for name in ("first", "again"):
        place = shutil.copytree(pair / "stopped", tmp_path / name)
        assert main([f"--resume={place}", "--nproc=1", "--epochs=6", "--show_users=0"]) == 0
        tensors, content = checkpoint.load(place / LAST)
        assert content["processes"] == 1
        assert not any(key.startswith("rng1.") for key in tensors)
        log = (place / f"{name}.log").read_text()
        assert log.count("the random states are drawn anew: 2 processes wrote those of") == 1
        ends.append(files.digest(tensors | {"step": torch.tensor(content["progress"]["epoch"])}))
        assert content["progress"]["epoch"] == 6
    assert ends[0] == ends[1]


def test_random_states_drawn_anew_are_those_of_no_other_process(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    for n, number in ((1, 0), (3, 0), (3, 1), (3, 2), (2, 0), (2, 1)):
        monkeypatch.setattr(distributed, "world_size", lambda n=n: n)
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        drawn.append(Resumed(pair / "stopped" / LAST).random_states())
    stored = checkpoint.subset(checkpoint.load(pair / "stopped" / LAST)[0], "rng1")
    assert torch.equal(drawn[-1]["torch"], stored["torch"])
    for name in ("torch", "python", "numpy"):
        assert len({files.digest({name: states[name]}) for states in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("other settings", "the processes differ in settings, data or version"),
        (
            "last batch",
            "train_batch_size=6 leaves a last batch of 1 of the 7 training rows, which 2",
        ),
        ("few rows", "eval_batch_size=1: 2 processes cannot divide batches of 1 to be scored"),
        ("drawn items", "several processes evaluate on all items only, mode=full"),
    ],
)
def test_what_cannot_be_divided_is_refused(pair: Path, reason: str, message: str) -> None:
    assert re.search(message, both(pair, "refused")[reason])


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc=0"], "--nproc=0 must be at least 1"),
        (["--nproc=2", "--model=SASRec"], "model=SASRec is trained by one process: .* SimDiffRec"),
        (["--nproc=2", "--model=DiffuASR"], "DiffuASR is trained by one process. .* augment"),
        (["--nproc=2", "--seeed=1"], "unknown key 'seeed'"),
        (
            ["--nproc=300", "--train_batch_size=256"],
            "train_batch_size=256 cannot be divided among 300 processes",
        ),
    ],
)
def test_refused_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.delattr(distributed, "launch")
    assert main(["--dataset=toy", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("resume", [[], ["--resume=nowhere"]])
def test_another_number_than_torchrun_started_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, resume: list[str]
) -> None:
    """It was ignored for a new run; of one that is resumed, the message spoke of the checkpoint."""
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    given = resume or ["--dataset=toy"]
    assert main([*given, "--nproc=4"]) == 2
    error = capsys.readouterr().err
    assert "--nproc=4 was given to a run of 2 processes that torchrun started; leave" in error


def test_a_process_lost_before_anything_is_saved_leaves_nothing_to_resume(tmp_path: Path) -> None:
    for saved, said in (
        (False, "Begin it again without --resume; --nproc may"),
        (True, "--resume"),
    ):
        if saved:
            (tmp_path / LAST).touch()
        with pytest.raises(ProcessLost) as lost, explained_loss(tmp_path):
            raise ProcessLost("another process of this run has ended")
        assert said in str(lost.value)
        assert (f"--resume={tmp_path} --nproc=1" in str(lost.value)) == saved


def test_only_training_is_for_several(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["list"]) == 2
    assert "process 1: error: list is a command for one process" in capsys.readouterr().err


def test_every_model_says_whether_it_can_be_divided(tmp_path: Path) -> None:
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    for name, model in plugin_models().items():
        if not issubclass(model, FittedModel):
            check_processes(make(tmp_path, name), 2)
            continue
        with pytest.raises(UserError, match=f"{name} .*cannot|{name}"):
            check_processes(make(tmp_path, name), 2)


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """begin(code=...) -> a long run by two processes."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    values = LONG | DIVIDED | {"data_path": str(tmp_path / "dataset")}
    values |= {"checkpoint_dir": str(tmp_path / "saved"), "epochs": 2000, "stopping_step": 2000}
    given = ["--dataset=toy", "--nproc=2", *(f"--{key}={value}" for key, value in values.items())]
    return lambda code=None: start(*given, code=code)


def test_ctrl_c_saves_once(begin: Any, tmp_path: Path) -> None:
    process = begin()
    wait_for(process, "train epoch   3")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all in the foreground
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, error
    assert "Traceback" not in error + out
    place = only_run(tmp_path / "saved")
    assert error.count("stopped by SIGINT; everything is saved.") == 1
    assert f"--resume={place} --nproc=2" in error
    assert checkpoint.load(place / LAST)[1]["processes"] == 2
    assert not list(place.glob(".*.tmp"))


# Process 1 is killed in its tenth step.
KILLED = """
import os, signal, sys
from recbole_simdiff.cli.main import main
from recbole_simdiff.models.simdiffrec import SimDiffRec
stock, calls = SimDiffRec.calculate_loss, []
def calculate_loss(self, batch):
    calls.append(batch)
    if os.environ["RANK"] == "1" and len(calls) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, batch)
SimDiffRec.calculate_loss = calculate_loss
sys.exit(main(sys.argv[1:]))
"""


def test_a_lost_process_ends_the_others(begin: Any, tmp_path: Path) -> None:
    process = begin(code=KILLED)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert "Traceback" not in error
    assert "process 0: error: another process of this run has ended" in error
    assert f"Continue with --resume={only_run(tmp_path / 'saved')} --nproc=2, or give" in error
    assert "error: process 1 was ended by SIGKILL" in error
    assert checkpoint.load(only_run(tmp_path / "saved") / LAST)[1]["progress"]["epoch"] == 4


# The time limit of an exchange is 15 seconds.
IMPATIENT = """
import sys
from datetime import timedelta
from recbole_simdiff import distributed
from recbole_simdiff.cli.main import main
distributed.TIMEOUT = timedelta(seconds=15)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_host_ends_the_run_which_the_other_one_resumes(
    tmp_path: Path, lost: signal.Signals
) -> None:
    """One that is gone is noticed at once, one that is silent when the time is over."""
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    program = tmp_path / "program.py"
    program.write_text(IMPATIENT)
    values = LONG | DIVIDED | {"data_path": str(tmp_path / "dataset"), "stopping_step": 2000}
    values |= {"checkpoint_dir": str(tmp_path / "saved"), "epochs": 2000}
    given = ["--dataset=toy", *(f"--{key}={value}" for key, value in values.items())]
    kept, gone = two_hosts(str(program), *given)
    wait_for(kept, "train epoch   3")
    children = [
        int(p) for p in Path(f"/proc/{gone.pid}/task/{gone.pid}/children").read_text().split()
    ]
    for process in (*children, gone.pid):
        os.kill(process, lost)
    begun = time.monotonic()
    _, error = kept.communicate(timeout=120)
    assert time.monotonic() - begun < 60
    for process in (*children, gone.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    gone.communicate()
    assert kept.returncode != 0
    assert error.count("process 0: error: another process of this run has ended, or has not") == 1

    place = only_run(tmp_path / "saved")
    stored = checkpoint.load(place / LAST)[1]["progress"]
    assert (stored["epoch"] >= 4, stored["step"]) == (True, 0)
    epochs = f"--epochs={stored['epoch'] + 3}"
    assert main([f"--resume={place}", epochs]) == 2
    assert main([f"--resume={place}", epochs, "--nproc=1"]) == 0
    result = json.loads((place / RESULT).read_text())
    assert (result["processes"], result["epochs"]) == (1, stored["epoch"] + 3)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two: processes 0 and 1 of a host get one each, a third is refused."""
    assert distributed.local_gpu() == torch.device("cuda")
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for number in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert distributed.local_gpu() == torch.device("cuda", number)
    assert chosen == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="3 processes on a host with 2 GPUs: each needs one"):
        distributed.local_gpu()
