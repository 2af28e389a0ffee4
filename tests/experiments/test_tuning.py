"""The search for the best setting: nothing is tested before it is over, and nothing is lost."""

import csv
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from recbole.trainer import HyperTuning

from recbole_simdiff import files
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config import config as config_module
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.layers import read_yaml
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.protocols import KEPT
from recbole_simdiff.pipelines import diffuasr as augmentation
from recbole_simdiff.pipelines import report
from recbole_simdiff.runs import build
from recbole_simdiff.runs.result import RESULT
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.trainer import PlanTrainer
from recbole_simdiff.tuning import search as tuning
from recbole_simdiff.tuning import space
from recbole_simdiff.tuning.engines import optuna as engine_of_optuna
from recbole_simdiff.tuning.engines import ray as engine_of_ray
from recbole_simdiff.tuning.screen import Screen
from recbole_simdiff.tuning.trials import (
    DONE,
    FAILED,
    PRUNED,
    STUDY,
    TRIALS,
    Search,
    Trial,
    import_engine,
)
from tests.conftest import SMALL

RATES = "learning_rate choice [0.003,0.01,0.03]\n"
MIXED = RATES + "hidden_dropout_prob uniform 0,0.5\n"
METRIC = "ndcg@5"
GENERATOR = {"backbone": "GRU4Rec", "augmenter": "random", "embedding_size": 16}


@pytest.fixture(autouse=True)
def _files_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of configurations are made here, of the same dozen files."""
    monkeypatch.setattr(config_module, "read_yaml", lambda path: deepcopy(parsed(Path(path))))


@cache
def parsed(path: Path) -> dict[str, Any]:
    return read_yaml(path)


def known(model: str, **changes: Any) -> dict[str, Any]:
    """Those of the small settings that the model knows, and the changes."""
    keys = Config(model, "toy", overrides={k: changes[k] for k in ("backbone",) if k in changes})
    small = {k: v for k, v in SMALL.items() if k in keys.final_config_dict}
    return small | {"hidden_size": 8, "epochs": 1} | changes


@pytest.fixture
def prepare(tmp_path: Path, data_path: Path) -> Callable[..., Search]:
    """prepare(text of the space, model, options of new_search, key=value) -> a search on toy."""

    def make(
        text: str, model: str = "SASRec", options: dict[str, Any] | None = None, **changes: Any
    ) -> Search:
        place = tmp_path / "my.hyper"
        place.write_text(text)
        dimensions = space.read_space(place)
        free = {dimension.key for dimension in dimensions} - changes.keys()
        settings = known(model, **{"data_path": str(data_path), **changes})
        settings = {key: value for key, value in settings.items() if key not in free}
        config = Config(model, "toy", overrides=settings)
        options = {"trials": 3, "output": tmp_path / "results"} | (options or {})
        return tuning.new_search(config, dimensions, (), settings, **options)

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every epoch that is trained in this process."""
    epochs: list[int] = []
    stock = PlanTrainer._train_epoch

    def count(self: Any, data: Any, epoch: int, *rest: Any) -> Any:
        epochs.append(epoch)
        return stock(self, data, epoch, *rest)

    monkeypatch.setattr(PlanTrainer, "_train_epoch", count)
    return epochs


@pytest.fixture
def by_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric of a model is its learning rate, so that the best setting is known."""

    def rate(self: Any, data: Any, protocols: Any, *_: Any) -> dict[str, dict[str, float]]:
        value = self.config["learning_rate"]
        names = [f"{m.lower()}@{k}" for m in self.config["metrics"] for k in self.config["topk"]]
        return {protocol: dict.fromkeys(names, value) for protocol in protocols}

    monkeypatch.setattr(Evaluator, "evaluate", rate)


def rows(search: Search) -> list[dict[str, str]]:
    with open(search.folder / TRIALS, newline="") as file:
        return list(csv.DictReader(file))


def names(search: Search, file: str) -> set[str]:
    """Trials whose folder has this file."""
    return {path.parent.name for path in search.folder.glob(f"trials/*/{file}")}


class Untouchable:
    """A test part that must not be read, in whatever way."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the test part was touched: {name}")

    def __iter__(self) -> Any:
        raise AssertionError("the test part was read")

    def __len__(self) -> int:
        raise AssertionError("the test part was counted")


@pytest.fixture
def no_test_part(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Until it is undone, every test loader is untouchable."""
    for module in (build, augmentation, tuning):
        stock = module.create_loaders
        monkeypatch.setattr(
            module, "create_loaders", lambda *given, s=stock: (*s(*given)[:2], Untouchable())
        )
    return monkeypatch


# ---------------------------------------------------------------- the test part


@pytest.mark.parametrize(
    ("engine", "model", "text", "changes"),
    [
        ("optuna", "SASRec", MIXED, {}),
        ("hyperopt", "SimDiffRec", "k_sample choice [2,3]\ntau loguniform -3,0\n", {}),
        ("optuna", "DreamRec", "guidance uniform 0,4\n", {"diffusion_steps": 20}),
        ("hyperopt", "DiffuASR", "learning_rate uniform 0.001,0.01\n", GENERATOR),
    ],
)
def test_the_test_part_is_not_read_before_the_search_is_over(
    prepare: Any,
    no_test_part: pytest.MonkeyPatch,
    engine: str,
    model: str,
    text: str,
    changes: dict[str, Any],
) -> None:
    search = prepare(text, model, {"engine": engine, "trials": 2}, **changes)
    trials = tuning.tune(search)
    assert [trial.state for trial in trials] == [DONE, DONE]
    assert names(search, RESULT) == {trial.run for trial in trials}
    for path in search.folder.glob(f"trials/*/{RESULT}"):
        stored = json.loads(path.read_text())
        assert stored["tested"] is False
        assert stored["test"] == stored["by_length"] == stored["sampling"] == {}
        assert stored["augmentation"].get("baseline", {}).get("test", {}) == {}
    best = search.ranked(trials)[0]
    with pytest.raises(AssertionError, match="the test part was"):
        tuning.test_best(search, best)  # the wire is live
    no_test_part.undo()
    assert tuning.test_best(search, best).test.keys() == {KEPT, "history removed"}


def test_the_best_setting_is_tested_with_the_weights_it_has(
    prepare: Any, trained: list[int], make_config: Any
) -> None:
    search = prepare(MIXED, epochs=2)
    trials = tuning.tune(search)
    assert len(trained) == 3 * 2
    best = search.ranked(trials)[0]
    found = tuning.test_best(search, best)
    assert len(trained) == 3 * 2
    assert found.tested
    assert found.valid[KEPT][METRIC] == best.score
    assert found.epochs == best.epochs == 2
    ordinary = run(make_config("SASRec", **known("SASRec", epochs=2), **best.values))
    assert (ordinary.valid, ordinary.test) == (found.valid, found.test)
    assert tuning.test_best(search, best).test == found.test
    assert len(trained) == 3 * 2 + 2


def test_the_best_setting_is_trained_again_where_its_weights_are_not(
    prepare: Any, trained: list[int]
) -> None:
    """It was another machine's."""
    search = prepare(RATES)
    best = search.ranked(tuning.tune(search))[0]
    for name in (BEST, LAST, RESULT):
        (search.folder / "trials" / best.run / name).unlink()
    trained.clear()
    found = tuning.test_best(search, best)
    assert trained == [0]
    assert found.valid[KEPT][METRIC] == best.score


def test_augmented_data_are_compared_with_a_baseline_that_was_tested_afterwards(
    prepare: Any,
) -> None:
    search = prepare("n_pseudo choice [1,2]\n", "DiffuASR", {"trials": 2}, **GENERATOR)
    found = tuning.test_best(search, search.ranked(tuning.tune(search))[0])
    baseline = found.augmentation["baseline"]
    assert baseline["test"].keys() == found.test.keys()
    table = report.format_report(found).splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["all", "without"], ["all", "with"]]
    assert Path(baseline["run_dir"]).parent.name == "augmented"
    assert not list(search.folder.glob("trials/*/augmented"))


# ---------------------------------------------------------------- what is left


def test_the_best_setting_is_a_configuration_file(
    prepare: Any, by_rate: None, make_config: Any
) -> None:
    search = prepare(RATES + "n_layers quniform 2,2.5,2\n", options={"algo": "exhaustive"})
    trials = tuning.tune(search)
    path = search.folder / tuning.BEST_SETTING
    found = read_yaml(path)
    assert (found["learning_rate"], found["n_layers"]) == (0.03, 2)
    assert type(found["n_layers"]) is int  # hyperopt's floats are taken for a whole number
    assert found["topk"] == [1, 2, 5]
    assert "data_path" not in found
    head = path.read_text().splitlines()[:3]
    assert head[0].startswith("# The best of 3 trials of SASRec on toy (3 done, 0 pruned, 0 fail")
    assert head[1].startswith(f"# {METRIC} 0.03: validation, history kept, best epoch of trial ")
    assert head[2].startswith("# Engine optuna, exhaustive, seed 2020")
    config = Config("SASRec", "toy", [path])
    assert config["learning_rate"] == 0.03
    best = search.config(search.ranked(trials)[0].values)
    there = {"data_path": best.plain()["values"]["data_path"], "show_progress": False}
    there["use_gpu"] = False
    assert Config("SASRec", "toy", [path], there).plain() == best.plain()
    assert [p.name for p in search.folder.glob(".*.tmp")] == []


def test_trials_are_a_table(prepare: Any, by_rate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SHOWN_TRIALS", 2)
    search = prepare(RATES, options={"algo": "exhaustive"}, epochs=2)
    trials = tuning.tune(search)
    table = rows(search)
    assert [int(row["trial"]) for row in table] == [trial.number for trial in trials]
    assert {float(row["learning_rate"]) for row in table} == {0.003, 0.01, 0.03}
    for row in table:
        assert row[METRIC] == row["learning_rate"]
        assert (row["state"], row["epochs_trained"], row["error"]) == (DONE, "2", "")
        assert float(row["seconds"]) > 0
        assert (search.folder / "trials" / row["run"] / RESULT).is_file()
    text = tuning.summary(search, trials).splitlines()
    assert text[0].startswith("SASRec on toy: 3 trials done, 0 pruned, 0 failed")
    assert text[1].split() == ["trial", METRIC, "epochs", "learning_rate"]
    assert [line.split()[1:] for line in text[2:4]] == [
        ["0.03000", "2", "0.03"],
        ["0.01000", "2", "0.01"],
    ]
    assert text[4] == ""
    assert text[-1].endswith("--config_files=results/tune-SASRec-toy/best.yaml")


def test_less_may_be_better(prepare: Any, by_rate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "_set_default_parameters", smaller(Config._set_default_parameters))
    search = prepare(RATES, options={"algo": "exhaustive"})
    assert not search.bigger
    assert search.ranked(tuning.tune(search))[0].values == {"learning_rate": 0.003}
    study = optuna.load_study(study_name="SASRec-toy", storage=search.storage)
    assert study.direction == optuna.study.StudyDirection.MINIMIZE


def smaller(stock: Any) -> Any:
    """A validation metric of which less is better."""

    def make(self: Any) -> None:
        stock(self)
        self.final_config_dict["valid_metric_bigger"] = False

    return make


def test_a_tie_goes_to_the_earlier_trial(prepare: Any) -> None:
    search = prepare(RATES)
    trials = [Trial(n, {}, DONE, score) for n, score in enumerate([0.1, 0.3, 0.3])]
    trials += [Trial(3, {}, PRUNED, 0.9), Trial(4, {}, FAILED)]
    assert [trial.number for trial in search.ranked(trials)] == [1, 2, 0]
    assert [search.value(trial) for trial in trials[2:]] == [0.3, -math.inf, -math.inf]


# ---------------------------------------------------------------- resuming and sharing


def test_the_seed_decides(prepare: Any, tmp_path: Path) -> None:
    found = [
        [
            trial.values
            for trial in tuning.tune(
                prepare(MIXED, options={"output": tmp_path / place, "trials": 2}, seed=seed)
            )
        ]
        for place, seed in (("one", 1), ("two", 1), ("three", 2))
    ]
    assert found[0] == found[1] != found[2]


def test_an_interrupted_trial_goes_on_where_it_stopped(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = {"trials": 2, "output": tmp_path / "unbroken"}
    unbroken = tuning.tune(prepare(MIXED, options=apart, epochs=3))
    search = prepare(MIXED, epochs=3)
    stock, seen = PlanTrainer._train_epoch, []

    def stop(self: Any, data: Any, epoch: int, *rest: Any) -> Any:
        seen.append(epoch)
        if len(seen) == 5:  # the second epoch of the second trial
            os.kill(os.getpid(), signal.SIGINT)
        return stock(self, data, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_train_epoch", stop)
        with pytest.raises(Interrupted) as found:
            tuning.tune(search)
    assert found.value.same_command
    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_train_epoch", stop)
        trials = tuning.tune(prepare(MIXED, epochs=3))
    assert seen == [0, 1, 2, 0, 1, 1, 2, 0, 1, 2]
    assert [trial.number for trial in trials] == [0, 2, 3]  # number 1 was repeated as 2
    for trial, wanted in zip(trials[:2], unbroken[:2], strict=True):
        assert (trial.values, trial.score, trial.epochs) == (wanted.values, wanted.score, 3)
    study = optuna.load_study(study_name="SASRec-toy", storage=search.storage)
    assert set(study.trials[2].intermediate_values) == {0, 1, 2}


def test_a_trial_whose_process_died_is_given_to_another(
    prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_of_optuna, "HEARTBEAT", 1)
    monkeypatch.setattr(engine_of_optuna, "SILENCE", 1)
    search = prepare(MIXED, options={"trials": 2})
    study = begin(search)
    lost = study.ask()
    drawn = {d.key: engine_of_optuna._suggest(lost, d) for d in search.space}
    study._storage.record_heartbeat(lost._trial_id)
    trials = tuning.tune(search)
    assert [trial.state for trial in trials] == [DONE, DONE]
    assert lost.number not in [trial.number for trial in trials]
    wanted = {d.key: d.value(drawn[d.key]) for d in search.space}
    assert wanted in [dict(trial.values) for trial in trials]
    assert study.trials[0].state.name == "FAIL"


def test_a_study_waits_for_the_trials_of_other_processes(
    prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not over before they are; one of them may be the best."""
    search = prepare(RATES, options={"trials": 1})
    study = begin(search)
    other = study.ask()
    engine_of_optuna._suggest(other, search.space[0])
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            study.tell(other, 0.9)

    monkeypatch.setattr(time, "sleep", sleep)
    trials = tuning.tune(search)
    assert len(waited) == 2
    assert [(trial.number, trial.score) for trial in trials] == [(0, 0.9)]


def test_several_processes_work_on_one_study(prepare: Any, tmp_path: Path) -> None:
    search = prepare(MIXED, options={"jobs": 2, "trials": 4})
    trials = tuning.tune(search)
    assert sorted(trial.number for trial in trials) == [0, 1, 2, 3]
    assert {trial.state for trial in trials} == {DONE}
    assert len({trial.values["hidden_dropout_prob"] for trial in trials}) == 4
    logs = [path.read_text() for path in search.folder.glob("worker-*.log")]
    assert len(logs) == 2
    assert sum(text.count("\ntrial ") + text.startswith("trial ") for text in logs) >= 4
    alone = tuning.tune(prepare(MIXED, options={"trials": 1, "output": tmp_path / "alone"}))
    assert alone[0].values == trials[0].values
    assert alone[0].score == trials[0].score
    assert len(rows(search)) == 4


def test_trials_are_counted_and_begun_in_turn(
    prepare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two workers that look at the same time would both begin the last trial."""
    search = prepare(RATES, options={"trials": 1})
    study = begin(search)

    def elsewhere(self: Search, *_: Any) -> Any:
        with files.exclusive(search.folder / STUDY):  # free while a trial is trained
            return SimpleNamespace(valid={KEPT: {METRIC: 0.5}}, epochs=1, seconds=1.0)

    monkeypatch.setattr(Search, "measure", elsewhere)
    worker = threading.Thread(
        target=engine_of_optuna._make_trials, args=(search, study, Screen(search, [])), daemon=True
    )
    with files.exclusive(search.folder / STUDY):
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
        assert not study.trials
        done = optuna.trial.create_trial(
            value=0.1,
            params={"learning_rate": "0.01"},
            distributions={
                "learning_rate": optuna.distributions.CategoricalDistribution(
                    list(search.space[0].texts)
                )
            },
        )
        study.add_trial(done)
    worker.join(60)
    assert not worker.is_alive()
    assert len(study.trials) == 1
    study.enqueue_trial({})
    engine_of_optuna._make_trials(search, study, Screen(search, []))
    assert [trial.value for trial in study.trials] == [0.1, 0.5]


def test_a_worker_that_cannot_work_is_named(prepare: Any) -> None:
    search = prepare(RATES, options={"jobs": 2})
    search.folder.mkdir(parents=True)
    (search.folder / "trials").write_text("in the way")
    with pytest.raises(UserError, match=r"a worker of the search ended with code 1; see .*\.log"):
        tuning.tune(search)
    assert "Traceback" in (search.folder / "worker-0.log").read_text()


def begin(search: Search) -> Any:
    """The study of a search, before any trial."""
    search.folder.mkdir(parents=True, exist_ok=True)
    return engine_of_optuna._open_study(search)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"epochs": 2}, RATES, r"was made with epochs=1, and now it is 2: scores cannot be comp"),
        ({}, RATES.replace("0.03", "0.1"), r"made with learning_rate='search over choice \[0.003"),
        ({}, RATES + "n_layers choice [1,2]\n", r"made with n_layers=2, and now it is 'search ov"),
    ],
)
def test_trials_of_another_search_are_not_mixed_in(
    prepare: Any, changes: dict[str, Any], text: str, message: str
) -> None:
    begin(prepare(RATES, hidden_size=4))  # holds nothing yet
    begin(prepare(RATES)).ask()
    with pytest.raises(UserError, match=message):
        tuning.tune(prepare(text, **changes))


def test_other_data_are_another_search(prepare: Any, data_path: Path) -> None:
    begin(prepare(RATES)).ask()
    with open(data_path / "toy" / "toy.inter", "a") as file:
        file.write("g\ti1\t0\n")
    with pytest.raises(UserError, match="was made with data="):
        tuning.tune(prepare(RATES))


def test_another_file_of_vectors_is_another_search(
    prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its path is absolute, since workers may be in other folders."""
    monkeypatch.chdir(tmp_path)
    vectors = tmp_path / "v.npz"
    vectors.write_bytes(b"1")
    search = prepare(RATES, item_vectors="v.npz")
    assert search.settings["item_vectors"] == str(vectors)
    begin(search).ask()
    vectors.write_bytes(b"2")
    with pytest.raises(UserError, match="was made with content of item_vectors="):
        tuning.tune(prepare(RATES, item_vectors="v.npz"))


def test_other_code_is_another_search(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for single runs: what trains may have changed, and old scores with it."""
    first = tuning.tune(prepare(RATES, options={"trials": 1}))
    search = prepare(RATES, options={"trials": 1})
    message = "was made with code of recbole_simdiff='[0-9a-f]{16}', and now it is 'of tomorrow'"
    with monkeypatch.context() as patch:
        patch.setattr(engine_of_optuna, "source_checksum", lambda: "of tomorrow")
        with pytest.raises(UserError, match=message):
            tuning.tune(search)
    assert tuning.tune(search) == first


def test_a_storage_that_cannot_be_used(prepare: Any, tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path / 'gone' / 'study.db'}", "odd://host/base"):
        with pytest.raises(UserError, match="--storage cannot be used: "):
            tuning.tune(prepare(RATES, options={"storage": url}))


def test_a_storage_elsewhere(prepare: Any, tmp_path: Path) -> None:
    search = prepare(RATES, options={"trials": 1, "storage": f"sqlite:///{tmp_path / 'my.db'}"})
    assert len(tuning.tune(search)) == 1
    assert (tmp_path / "my.db").is_file()
    assert not (search.folder / STUDY).exists()


# ---------------------------------------------------------------- pruning and failing


@pytest.mark.parametrize("pruning", [True, False])
def test_bad_trials_are_stopped_early(
    prepare: Any, by_rate: None, monkeypatch: pytest.MonkeyPatch, pruning: bool
) -> None:
    monkeypatch.setattr(engine_of_optuna, "MEDIAN_TRIALS", 1)
    monkeypatch.setattr(engine_of_optuna, "MEDIAN_WARMUP", 2)
    text = "learning_rate choice [0.03,0.001]\n"
    search = prepare(text, options={"pruning": pruning, "trials": 6}, epochs=5, stopping_step=9)
    trials = tuning.tune(search)
    bad = [trial for trial in trials if trial.values["learning_rate"] == 0.001]
    assert 0 < len(bad) < 6
    if not pruning:
        assert {trial.state for trial in trials} == {DONE}
        return
    first_good = min(t.number for t in trials if t.values["learning_rate"] == 0.03)
    late = [trial for trial in bad if trial.number > first_good and trial.state == PRUNED]
    assert late
    for trial in late:
        assert trial.epochs == 3  # the first evaluation after the warm-up
        assert trial.score == 0.001
        assert trial.run not in names(search, BEST) | names(search, LAST)
    assert search.ranked(trials)[0].values == {"learning_rate": 0.03}
    assert {row["state"] for row in rows(search)} == {trial.state for trial in trials}


def test_a_score_that_is_no_number_is_a_failure(
    prepare: Any, by_rate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Evaluator.evaluate

    def spoil(self: Any, *given: Any) -> Any:
        found = stock(self, *given)
        if self.config["learning_rate"] == 0.03:
            found[KEPT][METRIC] = math.nan
        return found

    monkeypatch.setattr(Evaluator, "evaluate", spoil)
    trials = tuning.tune(prepare(RATES, options={"algo": "exhaustive"}))
    (failed,) = [trial for trial in trials if trial.state == FAILED]
    assert failed.error == f"ValueError: {METRIC} is nan"


# ---------------------------------------------------------------- every engine


@pytest.mark.parametrize("engine", ["optuna", "hyperopt"])
class TestEveryEngine:
    """But for Ray, whose trials are out of reach of a test in other processes."""

    def test_the_same_command_goes_on_to_the_number_of_trials(
        self, prepare: Any, trained: list[int], engine: str
    ) -> None:
        first = tuning.tune(prepare(MIXED, options={"engine": engine}))
        assert len(trained) == 3
        assert tuning.tune(prepare(MIXED, options={"engine": engine})) == first
        assert len(trained) == 3
        more = tuning.tune(prepare(MIXED, options={"engine": engine, "trials": 5}))
        assert len(trained) == 5
        assert more[:3] == first
        assert len({trial.values["hidden_dropout_prob"] for trial in more}) == 5

    def test_only_the_best_weights_are_kept(self, prepare: Any, by_rate: None, engine: str) -> None:
        search = prepare(RATES, options={"engine": engine, "trials": 8})
        best = search.ranked(tuning.tune(search))[0]
        assert best.values == {"learning_rate": 0.03}
        assert len(names(search, RESULT)) == 3
        assert names(search, BEST) == names(search, LAST) == {best.run}

    def test_an_impossible_combination_fails_with_its_reason_and_the_search_goes_on(
        self, prepare: Any, engine: str
    ) -> None:
        text = "hidden_size choice [8,9]\nn_heads choice [1,2]\n"  # 9 is no multiple of 2
        algo = "exhaustive" if engine == "optuna" else "bayes"
        search = prepare(text, options={"engine": engine, "algo": algo, "trials": 12})
        trials = tuning.tune(search)
        assert {trial.state for trial in trials} == {DONE, FAILED}
        failed, *_ = [trial for trial in trials if trial.state == FAILED]
        assert failed.values == {"hidden_size": 9, "n_heads": 2}
        reason = "UserError: model=SASRec cannot be built for dataset='toy': The hidden size (9)"
        assert failed.error.startswith(reason)
        assert failed.score is None
        row, *_ = [row for row in rows(search) if row["state"] == FAILED]
        assert row["error"] == failed.error
        assert row[METRIC] == ""
        assert tuning.tune(search)[: len(trials)] == trials  # nor is it tried again

    def test_when_every_trial_fails_the_commonest_reason_is_told(
        self, prepare: Any, engine: str
    ) -> None:
        search = prepare(RATES, options={"engine": engine}, hidden_size=9)
        with pytest.raises(
            UserError, match=r"none of 3 trials could be finished; 3 failed with .*size \(9\)"
        ):
            tuning.tune(search)
        assert len(rows(search)) == 3
        assert not (search.folder / tuning.BEST_SETTING).exists()

    def test_a_fault_of_the_program_ends_the_search(
        self, prepare: Any, monkeypatch: pytest.MonkeyPatch, engine: str
    ) -> None:
        """A full disk or a bug is no property of a setting."""

        def broken(*_: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(PlanTrainer, "save_state", broken)
        with pytest.raises(OSError, match="no space left"):
            tuning.tune(prepare(RATES, options={"engine": engine}))


# ---------------------------------------------------------------- before the first trial


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("n_laers choice [1]\n", {}, r"my.hyper, line 1: unknown key 'n_laers' \(search\) .* did"),
        (
            "# two\nn_layers choice ['two']\n",
            {},
            r"my.hyper, line 2: n_layers='two' \(search\) mus",
        ),
        ("n_layers uniform 1,3\n", {}, r"line 1: n_layers=2.2.* must be a whole number"),
        ("n_layers quniform 1,3,0.5\n", {}, r"n_layers=1.5 \(search\) must be a whole number"),
        ("learning_rate choice [0.1,-1]\n", {}, r"line 1: learning_rate=-1.0 must be positive"),
        ("hidden_act choice ['gelu','gulu']\n", {}, r"hidden_act='gulu' \(search\) is not one of"),
        ("topk choice [[5],[10]]\n", {}, "line 1: topk cannot be searched: it belongs to data, ev"),
        ("seed choice [1,2]\n", {}, "seed cannot be searched"),
        ("user_inter_num_interval choice ['[5,inf)']\n", {}, "cannot be searched"),
        ("show_users choice [1,2]\n", {}, "cannot be searched"),
        (MIXED, {"algo": "exhaustive"}, r"line 2: an exhaustive search needs choice or quniform"),
        (RATES, {"algo": "grid"}, "--algo=grid: engine optuna has bayes, random, exhaustive$"),
        (RATES, {"engine": "skopt"}, "--engine=skopt is not one of optuna, hyperopt, ray"),
        (RATES, {"engine": "ray", "algo": "bayes"}, "--algo=bayes: engine ray has random, exhau"),
        (RATES, {"trials": 0}, "--trials=0 must be at least 1"),
        (RATES, {"jobs": 0}, "--jobs=0 must be at least 1"),
        (RATES, {"engine": "hyperopt", "jobs": 2}, "--jobs=2: RecBole's HyperTuning makes one tr"),
        (
            RATES,
            {"engine": "hyperopt", "storage": "x"},
            "--storage is an option of Optuna; engine hyperopt",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    prepare: Any, trained: list[int], tmp_path: Path, text: str, options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(text, options=options)
    assert trained == []
    assert not (tmp_path / "results").exists()


def test_a_value_that_some_combination_allows_is_not_refused(prepare: Any) -> None:
    """With the default of reverse_steps, 10, fewer diffusion steps than that are impossible."""
    text = "diffusion_steps choice [2,20]\nreverse_steps choice [4,1]\n"
    with pytest.raises(UserError, match="reverse_steps"):
        prepare("diffusion_steps choice [2,20]\n", "SimDiffRec", reverse_steps=10)
    assert len(prepare(text, "SimDiffRec").space) == 2


def test_what_the_command_line_fixes_is_not_searched(
    prepare: Any, caplog: pytest.LogCaptureFixture
) -> None:
    search = prepare(RATES + "n_layers choice [1,2]\n", options={"trials": 2}, n_layers=2)
    assert [dimension.key for dimension in search.space] == ["learning_rate"]
    for trial in tuning.tune(search):
        assert search.config(trial.values)["n_layers"] == 2


def test_a_command_line_that_fixes_everything_is_refused(prepare: Any) -> None:
    with pytest.raises(UserError, match="nothing to search: every parameter is given"):
        prepare(RATES, learning_rate=0.1)


def test_without_a_validation_part_there_is_nothing_to_search_by(prepare: Any) -> None:
    for part in ({"LS": "test_only"}, {"RS": [1, 0, 0]}):
        split = {"split": part, "group_by": "user", "order": "TO", "mode": "full"}
        with pytest.raises(UserError, match="a search needs a validation part"):
            prepare(RATES, eval_args=split)


def test_a_search_among_drawn_candidates_says_so(prepare: Any) -> None:
    split = {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "uni3"}
    search = prepare(RATES, options={"trials": 1}, eval_args=split)
    trials = tuning.tune(search)
    found = "validation, history kept, 3 uniform negatives"
    assert found in tuning.summary(search, trials)
    assert found in (search.folder / tuning.BEST_SETTING).read_text()


@pytest.mark.parametrize("engine", ["optuna", "hyperopt", "ray"])
def test_a_missing_engine_says_what_to_install(
    prepare: Any, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setitem(sys.modules, {"ray": "ray.tune"}.get(engine, engine), None)
    what = {"ray": r"--upgrade 'ray\[tune\]'"}.get(engine, r"'recbole_simdiff\[tune\]'")
    with pytest.raises(UserError, match=rf"engine {engine} cannot be used .*: pip install {what}"):
        prepare(RATES, options={"engine": engine})


def test_a_ray_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.tune"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="2.6.3"))
    with pytest.raises(UserError, match=r"ray 2\.6\.3 is too old"):
        import_engine("ray")


# ---------------------------------------------------------------- hyperopt


def test_recboles_hypertuning_does_the_search(
    prepare: Any, monkeypatch: pytest.MonkeyPatch, trained: list[int], capsys: Any
) -> None:
    made: list[HyperTuning] = []
    stock = HyperTuning.__init__
    monkeypatch.setattr(
        HyperTuning, "__init__", lambda self, *a, **k: (made.append(self), stock(self, *a, **k))[0]
    )
    search = prepare(MIXED, options={"engine": "hyperopt", "trials": 4})
    trials = tuning.tune(search)
    assert made[0].best_score == search.ranked(trials)[0].score
    assert len(made[0].score_list) == len(trials) == 4
    assert "running parameters" not in capsys.readouterr().out
    assert len(trained) == 4
    assert "HYPEROPT_FMIN_SEED" not in os.environ


def test_an_exhaustive_search_tries_every_combination_once(prepare: Any) -> None:
    text = "n_layers choice [1,2]\nhidden_dropout_prob quniform 0,0.1,0.1\n"
    search = prepare(text, options={"algo": "exhaustive", "trials": 1})
    tried = [tuple(trial.values.values()) for trial in tuning.tune(search)]
    assert sorted(tried) == [(n, p) for n in (1, 2) for p in (0.0, 0.1)]


# ---------------------------------------------------------------- Ray


def test_ray_where_it_runs_and_a_clear_word_where_it_does_not(prepare: Any) -> None:
    """RecBole's metadata pin a ray that today's libraries do not run; a newer one works."""
    text = MIXED + "inner_size quniform 8,16,8\nattn_dropout_prob loguniform -4,-1\n"
    try:
        importlib.import_module("ray.tune").RunConfig  # noqa: B018
    except (ImportError, AttributeError):
        with pytest.raises(UserError, match=r"engine ray cannot be used .*'ray\[tune\]'"):
            prepare(text, options={"engine": "ray", "trials": 2})
        return
    search = prepare(text, options={"engine": "ray", "trials": 2, "jobs": 2}, epochs=2)
    trials = tuning.tune(search)
    assert [trial.state for trial in trials] == [DONE, DONE]
    assert names(search, BEST) == {search.ranked(trials)[0].run}
    for trial in trials:
        stored = json.loads((search.folder / "trials" / trial.run / RESULT).read_text())
        assert stored["test"] == {}
        assert stored["valid"][KEPT][METRIC] == trial.score
        assert stored["epochs"] == trial.epochs == 2
    assert tuning.test_best(search, search.ranked(trials)[0]).tested


def test_what_ray_found_becomes_trials(prepare: Any) -> None:
    search = prepare(RATES)
    drawn = {"learning_rate": "0.01"}

    def record(metrics: Any, error: Any = None) -> Trial:
        return engine_of_ray._trial_of(
            search, 7, SimpleNamespace(config=drawn, metrics=metrics, error=error)
        )

    done = record({"score": 0.5, "epochs": 3, "seconds": 1.5, "finished": True})
    assert (done.number, done.values, done.state) == (7, {"learning_rate": 0.01}, DONE)
    assert (done.score, done.epochs, done.seconds) == (0.5, 3, 1.5)
    assert done.run == search.run_dir(search.config(done.values)).name
    pruned = record({"score": 0.25, "epochs": 2, "seconds": 1.0})
    assert (pruned.state, pruned.score) == (PRUNED, 0.25)
    failed = record(None, RuntimeError("ray::train()\n  File x\nUserError: tau=0 must be positive"))
    assert (failed.state, failed.score) == (FAILED, None)
    assert failed.error == "UserError: tau=0 must be positive"


# ---------------------------------------------------------------- the command


@pytest.fixture
def call(tmp_path: Path, data_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """call(*arguments, model=, key=value) -> exit code, standard output, standard error."""

    def command(*given: str, model: str = "SASRec", **changes: Any) -> tuple[int, str, str]:
        values = known(model, **changes) | {"data_path": data_path}
        settings = [f"--{key}={value}" for key, value in values.items()]
        code = main([given[0], f"--model={model}", "--dataset=toy", *given[1:], *settings])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return command


def test_the_command_prints_the_best_and_its_test_once(
    call: Any, tmp_path: Path, by_rate: None
) -> None:
    (tmp_path / "my.hyper").write_text(RATES)
    code, out, err = call("tune", "--space=my.hyper", "--trials=3", "--algo=exhaustive")
    assert code == 0
    assert "SASRec on toy: 3 trials done" in out
    assert out.index("best setting: results/tune-SASRec-toy/best.yaml") < out.index("history kept ")
    assert [line.split()[0] for line in out.splitlines() if "history kept " in line] == [
        "valid",
        "test",
    ]
    assert err.count("trial 0 done ndcg@5") == 1
    assert "train epoch" not in err
    again = call("tune", "--space=my.hyper", "--trials=3", "--algo=exhaustive")
    assert again[:2] == (0, out)


def test_the_best_setting_can_be_used_as_it_is_printed(call: Any, tmp_path: Path) -> None:
    (tmp_path / "my.hyper").write_text(MIXED)
    code, out, _ = call("tune", "--space=my.hyper", "--trials=2", epochs=2)
    assert code == 0
    (used,) = [line for line in out.splitlines() if line.startswith("use it with: ")]
    code = main(
        ["train", *used.split()[3:], f"--data_path={tmp_path / 'dataset'}", "--use_gpu=False"]
    )
    assert code == 0
    (result,) = (tmp_path / "saved").glob(f"*/{RESULT}")
    found = json.loads(result.read_text())
    head = (tmp_path / "results/tune-SASRec-toy/best.yaml").read_text().splitlines()[1]
    assert head.startswith(f"# {METRIC} {found['valid'][KEPT][METRIC]!r}:")


def test_the_shipped_space_is_the_default_and_a_fixed_key_leaves_it(call: Any) -> None:
    code, out, _ = call("tune", "--trials=1", n_layers=1)
    assert code == 0
    head = next(line for line in out.splitlines() if line.startswith("trial "))
    wanted = ["learning_rate", "attn_dropout_prob", "hidden_dropout_prob", "n_heads"]
    assert head.split()[3:] == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--space=gone.hyper"], "cannot read the search space gone.hyper"),
        (["--engine=skopt"], "--engine=skopt is not one of"),
        (["--epoch=3"], "did you mean epochs?"),
        (["--config_files", "gone.yaml"], "cannot read the configuration file gone.yaml"),
    ],
)
def test_mistakes_of_the_command(call: Any, tmp_path: Path, given: list[str], message: str) -> None:
    code, out, err = call("tune", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "results").exists()


def test_a_model_without_a_shipped_space(data_path: Path, capsys: Any) -> None:
    assert main(["tune", "--model=DIEN", "--dataset=toy", f"--data_path={data_path}"]) == 2
    assert "no search space is shipped for DIEN" in capsys.readouterr().err


def test_configuration_files_lie_under_the_setting(tmp_path: Path, data_path: Path) -> None:
    (tmp_path / "my.hyper").write_text(RATES)
    (tmp_path / "base.yaml").write_text("learning_rate: 0.5\ninner_size: 24\nhidden_size: 8\n")
    settings = known("SASRec", data_path=data_path)
    given = ["tune", "--model=SASRec", "--dataset=toy", "--space=my.hyper", "--trials=1"]
    given += [f"--{k}={v}" for k, v in settings.items() if k not in ("inner_size", "hidden_size")]
    assert main([*given, "--config_files", "base.yaml"]) == 0
    found = read_yaml(tmp_path / "results/tune-SASRec-toy/best.yaml")
    assert found["learning_rate"] in (0.003, 0.01, 0.03)
    assert (found["inner_size"], found["hidden_size"]) == (24, 8)


def test_a_stopped_command_is_continued_by_the_same_one(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.hyper").write_text(RATES)
    stock = PlanTrainer._step

    def stopped(self: Any, *rest: Any) -> Any:
        self.stop.signum = signal.SIGTERM
        return stock(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_step", stopped)
        code, out, err = call("tune", "--space=my.hyper", "--trials=2")
    assert (code, out) == (128 + signal.SIGTERM, "")
    assert "everything is saved. Continue with\n  the same command" in err
    code, out, _ = call("tune", "--space=my.hyper", "--trials=2")
    assert code == 0
    assert "2 trials done" in out
