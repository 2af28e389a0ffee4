"""A run's checkpoint that lacks or garbles anything is refused with one message, by every command.

Files are made with a checksum that is right: only what they say is wrong.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recbole_simdiff import checkpoint, evaluate
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.config import Config
from recbole_simdiff.data import loading
from recbole_simdiff.errors import UserError
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.runs.stored import load_run
from recbole_simdiff.training import tracking
from tests.conftest import SEQUENCES, SMALL, write_inter


class Content(NamedTuple):
    """Of a checkpoint, to be changed in place."""

    tensors: dict[str, Tensor]
    json: dict[str, Any]

    @property
    def progress(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["progress"]
        return found

    @property
    def values(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["config"]["values"]
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs on toy."""
    folder = tmp_path_factory.mktemp("trained")
    write_inter(folder / "dataset", "toy", SEQUENCES)
    known = Config("SASRec", "toy").final_config_dict
    values = {key: value for key, value in SMALL.items() if key in known}
    values |= {"data_path": str(folder / "dataset"), "checkpoint_dir": str(folder / "saved")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return Path(run(Config("SASRec", "toy", overrides=values)).run_dir)


@pytest.fixture
def refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """refused(name, change, *commands) -> what follows "not a checkpoint of this version: "."""

    def check(change: Callable[[Content], Any], *commands: str) -> str:
        run_dir = tmp_path / trained.name
        shutil.copytree(trained, run_dir)
        for name in (BEST, LAST):
            content = Content(*checkpoint.load(run_dir / name))
            change(content)
            checkpoint.save(run_dir / name, content.tensors, content.json)
        found = set()
        for command in commands:
            before = sorted(path.name for path in run_dir.iterdir())
            start = [f"--resume={run_dir}"] if command == "resume" else [command]
            start += [] if command == "resume" else [f"--checkpoint={run_dir}"]
            start += ["--history=i1,i2"] if command == "recommend" else []
            start += ["--epochs=3"] if command == "resume" else []
            assert main(start) == 2
            error = capsys.readouterr().err
            (line,) = [text for text in error.splitlines() if text.startswith("error: ")]
            assert "Traceback" not in error
            _, wanted, problem = line.partition(" is not a checkpoint of this version: ")
            assert wanted, line
            found.add(problem)
            assert sorted(path.name for path in run_dir.iterdir()) == before
        (problem,) = found
        return problem

    return check


def drop(name: str) -> Callable[[Content], Any]:
    return lambda c: c.json.pop(name)


def put(**values: Any) -> Callable[[Content], Any]:
    return lambda c: c.progress.update(values)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Content], Any]:
    return lambda c: c.tensors.update({name: change(c.tensors[name])})


EVERYWHERE = [
    *((drop(name), f"it lacks {name}") for name in ("config", "items", "users", "titles")),
    *((drop(name), f"it lacks {name}") for name in ("progress", "statistics", "versions")),
    (lambda c: c.json["config"].pop("values"), "it lacks config.values"),
    (lambda c: c.json.update(config=[1]), "its config is a list of other values"),
    (lambda c: c.json["config"].update(model=None), "its config.model is None"),
    (lambda c: c.json.update(titles={"i1": 5}), "its titles is a dict of other values"),
    (lambda c: c.json["items"].append("i1"), "its items are not ids, each once, after [PAD]"),
    (lambda c: c.json["users"].pop(0), "its users are not ids, each once, after [PAD]"),
    (lambda c: c.json["statistics"].pop("users"), "it lacks statistics.users"),
    (lambda c: c.json["statistics"].update(more=1), "its statistics has 'more'"),
    (put(epoch=-5), "its progress.epoch is -5"),
    (put(epoch=10**9), "its progress.epoch is 1000000000, which its log contra"),
    (put(phase=True), "its progress.phase is True"),
    (put(misses="x" * 999), f"its progress.misses is '{'x' * 59}..."),
    (put(best_result={"ndcg@5": "high"}), "its progress.best_result is a dict of other values"),
    (put(newer=1), "its progress has 'newer'"),
    (put(log=[{"phase": "train"}]), "it lacks progress.log[0].epoch"),
    (put(step=2), "it lacks progress.loss_sums"),
    (lambda c: c.values.update(n_layers=10**9), "its n_layers is 1000000000, but it has 36 tens"),
    (tensor("data.history_items", lambda t: t + 99), "its data.history_items are not among its 12"),
    (tensor("data.history_items", torch.Tensor.float), "its data.history_items are not among its"),
    (tensor("data.history_ends", lambda t: t.flip(0)), "its data.history_ends are not those of 6"),
    (tensor("data.history_ends", lambda t: t[1:]), "its data.history_ends are not those of 6 use"),
    (tensor("data.history_ends", lambda t: t.view(1, -1)), "its data.history_ends are not those"),
    (lambda c: c.tensors.pop("data.history_ends"), "it lacks data.history_ends"),
    (
        lambda c: [c.tensors.pop(name) for name in list(c.tensors) if name.startswith("model.")],
        "it lacks the weights of the model",
    ),
    (
        lambda c: c.tensors.update({"data.pseudo": torch.full((7, 2), 13)}),
        "its data.pseudo are not among its 12 items",
    ),
]


@pytest.mark.parametrize(("change", "problem"), EVERYWHERE)
def test_every_command_refuses_it(
    refused: Any, change: Callable[[Content], Any], problem: str
) -> None:
    assert refused(change, "evaluate", "recommend", "resume").startswith(problem)


TRAINING = [
    (lambda c: c.progress.pop("step"), "it lacks progress.step"),
    (drop("optimizer"), "it lacks optimizer"),
    (lambda c: c.json["optimizer"].pop("groups"), "it lacks optimizer.groups"),
    (
        lambda c: c.json["optimizer"].update(groups=[]),
        "its optimizer has 0 groups of parameters, not 1",
    ),
    (
        lambda c: c.json["optimizer"]["groups"][0].update(lr=5.0),
        "its optimizer has lr, which is not the run's",
    ),
    (
        lambda c: c.json["optimizer"]["groups"][0]["params"].pop(),
        "its optimizer has params, which is not the run's",
    ),
    (lambda c: c.tensors.pop("optimizer.0.exp_avg"), "its optimizer has "),
    (tensor("optimizer.0.exp_avg", lambda t: t[:1]), "its optimizer has a 0.exp_avg of another m"),
    (lambda c: c.tensors.pop("rng.numpy"), "it lacks rng.numpy"),
    (tensor("rng.torch", lambda t: t[:9]), "its random states are none ("),
    (tensor("rng.python", lambda t: t[:9]), "its random states are none ("),
    (tensor("rng.numpy", lambda t: t[:9]), "its random states are none ("),
    (lambda c: c.json.update(processes=0), "its processes is 0"),
    (lambda c: c.json.update(processes=10**9), "its processes is 1000000000"),
    (put(phase=7), "its progress.phase is 7"),
    (put(step=99, loss_sums={"loss": 1.0}), "its progress.step is 99"),
    (lambda c: c.values.pop("learning_rate"), "it lacks config.values.learning_rate"),
]


@pytest.mark.parametrize(("change", "problem"), TRAINING)
def test_nothing_is_trained_on_in_silence(
    refused: Any, change: Callable[[Content], Any], problem: str
) -> None:
    """What only a continued training reads."""

    def last_alone(content: Content) -> None:
        if "optimizer" in content.json:  # the other one has none of this
            change(content)

    assert refused(last_alone, "resume").startswith(problem)


def test_a_foreign_checkpoint_downloads_nothing_and_makes_no_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names a data set that RecBole would fetch, and a place of its own for runs."""
    monkeypatch.setattr(loading, "download", lambda *_: pytest.fail("downloads"))
    run_dir = tmp_path / trained.name
    shutil.copytree(trained, run_dir)
    for name in (BEST, LAST):
        tensors, content = checkpoint.load(run_dir / name)
        content["config"]["values"]["checkpoint_dir"] = str(tmp_path / "theirs")
        checkpoint.save(run_dir / name, tensors, content)
    assert evaluate(run_dir).test
    assert not (tmp_path / "theirs").exists()
    for name in (BEST, LAST):
        tensors, content = checkpoint.load(run_dir / name)
        content["config"]["dataset"] = "amazon-beauty"
        content["config"]["values"]["data_path"] = str(tmp_path / "data")
        checkpoint.save(run_dir / name, tensors, content)
    message = r"amazon-beauty\.inter does not exist, and a checkpoint downloads nothing\. Point"
    with pytest.raises(UserError, match=message):
        evaluate(run_dir)
    with pytest.raises(UserError, match=message):
        run(resumed_config(run_dir / LAST, {}), run_dir / LAST)
    assert not (tmp_path / "data").exists()


def test_a_foreign_checkpoint_opens_no_tracker(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A run that was tracked here, which a file in its folder says, continues to be."""
    opened: list[str] = []

    class Recorder(tracking.MLflow):
        def __init__(self, config: Config, name: str, identity: str) -> None:
            opened.append(identity)
            self.epochs = 10**6

        def log(self, values: Any, step: int) -> None: ...

        def conclude(self, values: Any) -> None: ...

        def end(self, status: str) -> None: ...

    monkeypatch.setattr(tracking, "MLflow", Recorder)
    monkeypatch.setattr(tracking, "check_libraries", lambda _: None)
    run_dir = tmp_path / trained.name

    def resume(*given: str) -> None:
        tensors, content = checkpoint.load(trained / LAST)
        content["config"]["values"]["log_mlflow"] = True
        checkpoint.save(run_dir / LAST, tensors, content)
        assert main([f"--resume={run_dir}", *given]) == 0

    shutil.copytree(trained, run_dir)
    resume()
    assert opened == []
    assert "says log_mlflow=True, but no tracked run began in this folder" in caplog.text
    resume("--log_mlflow=true")
    resume()
    assert opened == [(run_dir / tracking.IDENTITY).read_text()] * 2


@pytest.mark.parametrize("content", ["[1, 2]", "7", "[" * 100_000 + "]" * 100_000])
def test_content_that_is_no_mapping(tmp_path: Path, content: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint.json, "dumps", lambda _: content)
    checkpoint.save(tmp_path / "a.safetensors", {}, {})
    with pytest.raises(UserError, match=r"is not a (readable checkpoint|checkpoint of this)"):
        load_run(tmp_path / "a.safetensors")


def test_what_was_written_is_read(trained: Path) -> None:
    """With and without what a training is continued from."""
    assert load_run(trained / BEST)[1]["progress"]["epoch"] >= 1
    tensors, content = load_run(trained / LAST, resumable=True)
    assert content["progress"]["epoch"] == 2
    assert content["optimizer"]["tensors"] == sum(n.startswith("optimizer.") for n in tensors)
    with pytest.raises(UserError, match=re.escape(f"use the run's {LAST}")):
        load_run(trained / BEST, resumable=True)
