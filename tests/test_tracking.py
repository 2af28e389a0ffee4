"""What Weights & Biases and MLflow are told, read back from what the real libraries wrote.

MLflow writes to an SQLite file that ``MlflowClient`` reads. W&B runs offline; its file is a log of
records, which are taken apart here and decoded with W&B's own message classes. What only a server
could show, a W&B run continued online and a tracker that stops answering, is shown by stand-ins.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import wandb
from mlflow.entities import Run
from wandb.proto import wandb_internal_pb2

from recbole_simdiff import distributed
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import Interrupted, TrainingDiverged, UserError
from recbole_simdiff.pipelines.diffuasr import run_stages
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import evaluate, restore
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training import tracking
from recbole_simdiff.training.progress import OnValidation
from recbole_simdiff.training.tracking import FAILED, FINISHED, IDENTITY, KILLED, Tracker
from recbole_simdiff.training.trainer import PlanTrainer
from recbole_simdiff.tuning.trials import import_engine
from tests.conftest import SEQUENCES, SMALL, write_inter

BOTH = {"log_mlflow": True, "log_wandb": True}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data base of MLflow; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def _store(empty_store: Path, tmp_path: Path) -> None:
    """A data base where MLflow looks for it."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries write below ``tmp_path``."""
    places = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "WANDB_DIR": str(tmp_path)}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    for name, value in (places | quiet | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}).items():
        monkeypatch.setenv(name, value)
    for name in tracking._PATIENCE:  # set by what is tested, and taken back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


# ---------------------------------------------------------------------- reading back


def mlflow_runs() -> list[Run]:
    """All runs, oldest first."""
    client = mlflow.MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))


def series(run: Run, name: str) -> dict[int, float]:
    """Step -> value; each step once."""
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
    assert len({metric.step for metric in history}) == len(history)
    return {metric.step: metric.value for metric in history}


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes.

    Blocks of 32 KiB hold chunks of checksum (4 bytes), length (2), kind (1) and content; a record
    is one whole chunk (kind 1) or a first one, others and a last one (2, 3, 4).
    """
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        if room < 7 or kind == 0:
            place += room
            continue
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def items(pairs: Any) -> dict[str, Any]:
    """What W&B stores as keys with JSON."""
    return {"/".join(pair.nested_key) or pair.key: json.loads(pair.value_json) for pair in pairs}


class WandBFile:
    """A run as its offline file has it."""

    def __init__(self, path: Path) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.summary: dict[str, Any] = {}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.name = record.run.run_id, record.run.display_name
                self.project, self.config = record.run.project, items(record.run.config.update)
            elif kind == "history":
                values = items(record.history.item)
                step = values.pop("_step", record.history.step.num)
                assert step not in self.steps
                self.steps[step] = {k: v for k, v in values.items() if not k.startswith("_")}
            elif kind == "summary":
                self.summary |= items(record.summary.update)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def wandb_files(folder: Path) -> list[WandBFile]:
    """All, oldest first, once W&B's own process has written them."""
    wandb.teardown()
    found = sorted(folder.glob("wandb/offline-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [WandBFile(path) for path in found]


def stopped_in_epoch(number: int, patch: pytest.MonkeyPatch) -> None:
    """A signal in the first step of an epoch, counted from 0."""
    stock = PlanTrainer._step

    def step(self: Any, *rest: Any) -> Any:
        if self.progress.epoch == number:
            self.stop.signum = signal.SIGTERM
        return stock(self, *rest)

    patch.setattr(PlanTrainer, "_step", step)


# ---------------------------------------------------------------------- the real libraries


@pytest.mark.usefixtures("_store")
def test_a_stopped_and_continued_run_is_one_tracked_run(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With every epoch once, the configuration, the result and how it ended."""
    config = make_config("CL4SRec", epochs=3, stopping_step=99, **BOTH)
    folder = tmp_path / "saved" / "my run"
    with monkeypatch.context() as patch:
        stopped_in_epoch(1, patch)
        with pytest.raises(Interrupted):
            run(config, run_dir=folder)
    (first,), (before,) = wandb_files(tmp_path), mlflow_runs()
    assert (first.exit_code, before.info.status) == (255, KILLED)
    assert (list(first.steps), list(series(before, "seconds"))) == ([1], [1])

    states: set[str] = set()
    result = run(
        make_config("CL4SRec", epochs=4, stopping_step=99, **BOTH),
        folder / LAST,
        listeners=[OnValidation(lambda _: states.add(mlflow_runs()[0].info.status))],
    )
    assert states == {"RUNNING"}
    log = json.loads((folder / RESULT).read_text())["log"]
    assert len(log) == 4
    (_, file), (there,) = wandb_files(tmp_path), mlflow_runs()
    assert (there.info.run_id, there.info.status) == (before.info.run_id, FINISHED)
    assert there.info.run_name == "my run"
    assert mlflow.MlflowClient().get_experiment(there.info.experiment_id).name == "recbole_simdiff"
    assert (file.id, file.name, file.project) == (first.id, "my run", "recbole")
    assert file.exit_code == 0

    assert list(file.steps) == [1, 2, 3, 4]
    for step, entry in enumerate(log, start=1):
        wanted = {f"train/{k}": v for k, v in entry["loss"].items()}
        wanted |= {f"valid/{k}": v for k, v in entry["valid"].items()}
        wanted |= {"epoch": entry["epoch"], "seconds": entry["seconds"]}
        assert {"train/rec", "train/contrastive", "valid/ndcg@5", "valid/hit@1"} <= set(wanted)
        assert file.steps[step] == pytest.approx(wanted)
        for name, value in wanted.items():
            found = series(there, name.replace("@", "_at_"))
            assert list(found) == [1, 2, 3, 4]
            assert found[step] == pytest.approx(value)

    ends = {"best_epoch": result.best_epoch, "seconds": result.seconds}
    ends |= {"peak_memory_mb": result.peak_memory_mb, "peak_gpu_memory_mb": 0.0}
    for split, protocols in (("valid", result.valid), ("test", result.test)):
        for protocol, metrics in protocols.items():
            for name, value in metrics.items():
                ends[f"{split}/{protocol.split()[1]}/{name}"] = value
    assert len(ends) == 4 + 4 * 9
    for name, value in ends.items():
        assert file.summary[f"result/{name}"] == pytest.approx(value)
        assert there.data.metrics[f"result/{name}".replace("@", "_at_")] == pytest.approx(value)

    settings = config.plain()["values"] | {"model": "CL4SRec", "dataset": "toy"}
    assert there.data.params == {name: str(value) for name, value in settings.items()}
    assert file.config.keys() >= settings.keys()
    assert file.config["epochs"] == 4  # W&B lets a setting change, MLflow does not
    assert file.config["eval_args"] == settings["eval_args"]


@pytest.mark.usefixtures("_store")
def test_a_run_made_anew_in_the_same_folder_is_another(make_config: Any, tmp_path: Path) -> None:
    """It would start behind the end of the old one, where trackers take no epochs."""
    config = make_config("SASRec", epochs=1, log_mlflow=True)
    for _ in range(2):
        run(config, run_dir=tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
    one, other = mlflow_runs()
    assert one.info.run_id != other.info.run_id
    assert one.info.run_name == other.info.run_name == "run"
    assert list(series(one, "epoch")) == list(series(other, "epoch")) == [1]


@pytest.mark.usefixtures("_store")
def test_a_finished_run_is_tracked_afterwards(make_config: Any, tmp_path: Path) -> None:
    run(make_config("SASRec"), run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / IDENTITY).exists()
    config = make_config("SASRec", log_mlflow=True, mlflow_experiment="other ones")
    assert main([f"--resume={tmp_path / 'run'}", "--log_mlflow=true"]) == 0
    run(config, tmp_path / "run" / LAST)
    one, other = mlflow_runs()
    for found in (one, other):
        assert list(series(found, "train/loss")) == [1, 2]
        assert "result/test/removed/hit_at_1" in found.data.metrics
    experiment = mlflow.MlflowClient().get_experiment(other.info.experiment_id)
    assert experiment.name == "other ones"


@pytest.mark.usefixtures("_store")
def test_results_of_drawn_candidates_are_tracked_under_their_name(make_config: Any) -> None:
    """MLflow refuses commas."""
    args = {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "uni3"}
    result = run(make_config("SASRec", epochs=1, log_mlflow=True, eval_args=args))
    (found,) = mlflow_runs()
    assert found.data.metrics["result/test/kept 3 uniform negatives/hit_at_1"] == pytest.approx(
        result.test["history kept, 3 uniform negatives"]["hit@1"]
    )


@pytest.mark.usefixtures("_store")
def test_each_stage_on_augmented_data_is_tracked(tmp_path: Path) -> None:
    """Baseline, generator and last stage are runs of their own; what the cache has is not."""
    users = {f"{copy}{user}": items for copy in range(10) for user, items in SEQUENCES.items()}
    write_inter(tmp_path / "dataset", "toy", users)
    values = {"backbone": "GRU4Rec", "embedding_size": 16, "epochs": 1, "length_groups": [3]}
    values |= {"n_pseudo": 1, "diffuasr_diffusion_steps": 25, "diffuasr_sample_steps": 2}
    values |= {"diffuasr_epochs": 3, "sunet_channel_mult": [1, 2], "log_mlflow": True}
    values |= {"augmentation_cache": "cache", "data_path": "dataset", "use_gpu": False}
    values |= {key: SMALL[key] for key in ("load_col", "topk", "valid_metric")}
    config = Config("DiffuASR", "toy", overrides=values)
    result = run_stages(config)
    baseline, generator, final = mlflow_runs()
    assert final.info.run_name == Path(result.run_dir).name
    assert baseline.info.run_name == Path(result.augmentation["baseline"]["run_dir"]).name
    assert generator.info.run_name.startswith("diffuser-toy-")
    log = result.augmentation["log"]
    assert series(generator, "diffuser/noise") == dict(enumerate(log["train"], start=1))
    assert series(generator, "valid/held_out") == dict(enumerate(log["held_out"], start=1))
    assert generator.data.metrics["result/loss"] == log["best"]
    assert {found.info.status for found in (baseline, generator, final)} == {FINISHED}
    run_stages(config)
    assert len(mlflow_runs()) == 4


def test_a_server_that_cannot_be_used_is_told_before_training(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """Also to the tracked run that was opened first."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    monkeypatch.setattr(PlanTrainer, "fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConnectionError, match="log_mlflow: MLflow cannot be used, and nothing was"):
        run(make_config("SASRec", **BOTH))
    (file,) = wandb_files(tmp_path)
    assert file.exit_code == 1
    values = make_config("SASRec").plain()["values"]
    (tmp_path / "mine.yaml").write_text(json.dumps(values | {"log_mlflow": True}))
    assert main(["--model=SASRec", "--dataset=toy", "--config_files", "mine.yaml"]) == 1
    assert "error: log_mlflow: MLflow cannot be used" in capsys.readouterr().err


# ---------------------------------------------------------------------- stand-ins


class Recorder(Tracker):
    """Keeps what it is told; ``down`` says at which calls of ``log`` nobody answers."""

    key, name, library = "log_mlflow", "Recorder", "json"
    made: list["Recorder"]
    down: range
    there = 0

    def __init__(self, config: Config, name: str, identity: str) -> None:
        self.run_name, self.identity, self.epochs = name, identity, self.there
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []
        self.result: dict[str, float] | None = None
        self.status, self.calls = "", 0
        type(self).made.append(self)
        self.draw()

    @staticmethod
    def draw() -> None:
        """As libraries do that wait for a random time."""
        random.random(), np.random.rand(), torch.rand(1)

    def log(self, values: dict[str, float], step: int) -> None:
        self.draw()
        self.calls += 1
        if self.calls - 1 in self.down:
            raise OSError("no route to host")
        self.steps.append(step)
        self.values.append(values)

    def conclude(self, values: dict[str, float]) -> None:
        self.draw()
        self.result = values

    def end(self, status: str) -> None:
        self.status = status


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """In the place of MLflow's; always there."""
    fresh = type("Fresh", (Recorder,), {"made": [], "down": range(0)})
    monkeypatch.setattr(tracking, "MLflow", fresh)
    return fresh


def numbers(run_dir: str) -> Any:
    """All of a result that training decides."""
    stored = json.loads((Path(run_dir) / RESULT).read_text())
    log = [{k: v for k, v in entry.items() if k != "seconds"} for entry in stored["log"]]
    return log, stored["valid"], stored["test"], stored["best_epoch"]


@pytest.mark.parametrize(
    ("down", "sent", "warnings"),
    [(range(0), 5, 0), (range(1, 2), 5, 1), (range(1, 99), 1, 2)],
    ids=["never", "once", "for good"],
)
def test_a_tracker_loses_no_training_and_changes_none(
    make_config: Any,
    recorder: type[Recorder],
    down: range,
    sent: int,
    warnings: int,
) -> None:
    """What it missed it gets at the end, if it answers then; meanwhile it is left alone."""
    plain = run(make_config("CL4SRec", epochs=5, stopping_step=99))
    recorder.down = down
    config = make_config("CL4SRec", epochs=5, stopping_step=99, log_mlflow=True)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.logger, "warning", lines.append)
        result = run(config)
    assert numbers(result.run_dir) == numbers(plain.run_dir)
    (made,) = recorder.made
    assert made.steps == list(range(1, sent + 1))
    assert len(lines) == warnings
    assert all("Recorder: no route to host" in line for line in lines)
    assert made.calls == sent + warnings
    assert (made.status, made.result is None) == ((FINISHED, False) if sent == 5 else ("", True))


def test_an_epoch_is_sent_when_it_is_saved(
    make_config: Any, recorder: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither before, or a crash would leave one that is trained again, nor at the end alone."""
    order: list[str] = []
    save, send = PlanTrainer.save_state, recorder.log
    monkeypatch.setattr(
        PlanTrainer, "save_state", lambda self, name: (order.append(name), save(self, name))[1]
    )
    monkeypatch.setattr(
        recorder, "log", lambda self, v, step: (order.append(str(step)), send(self, v, step))[1]
    )
    run(make_config("SASRec", log_mlflow=True))
    assert re.fullmatch(rf"{LAST} (best\S+ )?{LAST} 1 (best\S+ )?{LAST} 2", " ".join(order))


def test_phases_follow_one_another(
    make_config: Any, recorder: type[Recorder], tmp_path: Path
) -> None:
    """Their losses by name, one step an epoch over all, and what a model monitors."""
    run(make_config("ECLSR", stages=2, epochs=2, log_mlflow=True))
    (made,) = recorder.made
    log = json.loads(next((tmp_path / "saved").glob(f"*/{RESULT}")).read_text())["log"]
    phases = [entry["phase"] for entry in log]
    assert made.steps == list(range(1, len(log) + 1))
    assert len(set(phases)) == 2
    for entry, values in zip(log, made.values, strict=True):
        trained = entry["loss"] | entry["monitor"]
        own = {name for name in values if name.startswith(f"{entry['phase']}/")}
        assert own == {f"{entry['phase']}/{name}" for name in trained}
        assert values["epoch"] == entry["epoch"]
        assert values["valid/ndcg@5"] == entry["valid"]["ndcg@5"]


def test_what_a_model_monitors_is_sent(recorder: type[Recorder], make_config: Any) -> None:
    with tracking.tracked(make_config(log_mlflow=True), Path("folder")) as tracked:
        entry = {"phase": "pretrain", "epoch": 0, "loss": {"a": 1.0}, "monitor": {"b": 2.0}}
        tracked.send([entry | {"seconds": 3.0}])
    (made,) = recorder.made
    wanted = {"pretrain/a": 1.0, "pretrain/b": 2.0, "epoch": 0, "seconds": 3.0}
    assert made.values == [wanted]
    assert made.result is None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingDiverged("nan"), FAILED),
        (RuntimeError("bug"), FAILED),
        (Interrupted(2, Path("run")), KILLED),
        (KeyboardInterrupt(), KILLED),
        (import_engine("optuna").TrialPruned(), KILLED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_a_run_that_ends_early_is_closed(
    make_config: Any, recorder: type[Recorder], error: BaseException, status: str
) -> None:
    with (
        pytest.raises(type(error)),
        tracking.tracked(make_config(log_mlflow=True), Path("folder")),
    ):
        raise error
    assert [made.status for made in recorder.made] == [status]


def test_a_run_on_wandb_is_continued_where_it_stands(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the library: online it says which step comes next."""
    calls: list[Any] = []
    stand_in = types.SimpleNamespace(
        step=3,
        log=lambda values, step, commit: calls.append((step, commit, sorted(values))),
        finish=lambda exit_code: calls.append(exit_code),
    )
    module = types.SimpleNamespace(init=lambda **given: (calls.append(given), stand_in)[1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    entry = {"phase": "train", "loss": {"a": 1.0}, "monitor": {}, "seconds": 1.0}
    log = [entry | {"epoch": number} for number in range(4)]
    config = make_config(log_wandb=True, wandb_project=2026)
    for code in (0, 1):
        calls.clear()
        try:
            with tracking.tracked(config, Path("my folder")) as tracked:
                tracked.send(log)
                assert not code or 1 / 0
        except ZeroDivisionError:
            pass
        given, *logged, ended = calls
        assert [call[:2] for call in logged] == [(3, True), (4, True)]
        assert logged[0][2] == ["epoch", "seconds", "train/a"]
        assert ended == code
        assert (given["name"], given["project"]) == ("my folder", "2026")
        assert (given["resume"], given["reinit"]) == ("allow", "create_new")
        assert given["id"] == Path("my folder", IDENTITY).read_text()


def test_only_training_is_tracked(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, recorder: type[Recorder], tmp_path: Path
) -> None:
    """And by RecBole's own logger nothing at all."""
    module = types.SimpleNamespace(run=None, init=lambda **_: pytest.fail("opened a run"))
    run(make_config("SASRec", log_mlflow=True), run_dir=tmp_path / "run")
    monkeypatch.setattr(tracking, "WandB", type("None", (Recorder,), {"key": "log_wandb"}))
    monkeypatch.setattr(tracking, "_trackers", lambda _: [])
    run(make_config("SASRec", **BOTH), run_dir=tmp_path / "both")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(tracking, "tracked", lambda *_: pytest.fail("opened a run"))
    assert restore(tmp_path / "both").config["log_wandb"] is True
    assert evaluate(tmp_path / "both").test
    assert main(["recommend", f"--checkpoint={tmp_path / 'both'}", "--users=a"]) == 0
    assert [made.run_name for made in recorder.made] == ["run"]


def test_process_0_alone_tracks(
    make_config: Any, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(log_mlflow=True)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with tracking.tracked(config, Path("folder")):
        pass
    assert not recorder.made
    assert not Path("folder").exists()
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    with tracking.tracked(config, Path("folder")):
        pass
    assert len(recorder.made) == 1


@pytest.mark.parametrize(("key", "library"), [("log_wandb", "wandb"), ("log_mlflow", "mlflow")])
def test_a_missing_library_is_told_before_training(
    make_config: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Any,
    key: str,
    library: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    values = make_config("SASRec").plain()["values"]
    (tmp_path / "mine.yaml").write_text(json.dumps(values | {key: True}))
    assert main(["--model=SASRec", "--dataset=toy", "--config_files", "mine.yaml"]) == 2
    found = capsys.readouterr().err
    assert f"error: {key}=True needs {library}" in found
    assert f"pip install 'recbole_simdiff[{library}]'" in found
    assert not (tmp_path / "saved").exists()
    monkeypatch.setattr(distributed, "rank", lambda: 1)  # which logs nothing
    tracking.check_libraries(make_config("SASRec", **{key: True}))


def test_where_a_run_is_logged_is_no_part_of_it(make_config: Any) -> None:
    """A setting that is trained already is found, tracked or not."""
    plain = fingerprint(make_config("SASRec"), "data")
    changes = BOTH | {"wandb_project": "mine", "mlflow_experiment": "mine"}
    assert fingerprint(make_config("SASRec", **changes), "data") == plain
    with pytest.raises(UserError, match=r"log_mlflow='yes'.* must be true or false"):
        make_config("SASRec", log_mlflow="yes")


def test_a_server_that_does_not_answer_is_given_up_soon(
    make_config: Any, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says how long; and sooner than processes give one another up."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    with tracking.tracked(make_config(log_mlflow=True), Path("folder")):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7"
        retries = mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT")
    with tracking.tracked(make_config(log_mlflow=True), Path("folder")):
        timeout = mlflow.environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get()
    factor = mlflow.environment_variables.MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR.get()
    waits = sum(factor**k for k in range(1, retries + 1))
    assert (retries + 1) * timeout + waits < distributed.TIMEOUT.seconds / 2
