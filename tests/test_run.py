"""One training and its test: what is written, and that it repeats."""

import gzip
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff import RunResult, checkpoint, evaluate, load
from recbole_simdiff import __version__ as version
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.config import config as config_module
from recbole_simdiff.config import layers
from recbole_simdiff.errors import OutOfMemory, UserError
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS, REMOVED
from recbole_simdiff.models.simdiffrec import SimDiffRec
from recbole_simdiff.runs.build import evaluate_splits
from recbole_simdiff.runs.folder import claimed
from recbole_simdiff.runs.identity import source_checksum
from recbole_simdiff.runs.result import RESULT, format_table, read_result
from recbole_simdiff.runs.run import run_once
from recbole_simdiff.runs.run import run_one as run
from recbole_simdiff.training.progress import OnValidation
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SMALL


def split(mode: str) -> dict[str, Any]:
    return {"split": {"LS": mode}, "group_by": "user", "order": "TO", "mode": "full"}


@pytest.fixture
def go(make_config: Any) -> Any:
    """go(model, key=value, ...) -> (result, content of result.json)."""

    def start(model: str = "SimDiffRec", **changes: Any) -> tuple[RunResult, dict[str, Any]]:
        result = run(make_config(model, **changes))
        return result, json.loads((Path(result.run_dir) / RESULT).read_text())

    return start


def test_result_json_holds_all_that_is_needed_to_judge_a_run(go: Any) -> None:
    result, stored = go(epochs=3, stopping_step=99)
    for part in ("valid", "test"):
        assert list(stored[part]) == [KEPT, REMOVED]
        for metrics in stored[part].values():
            assert set(metrics) == {f"{m}@{k}" for m in ("hit", "ndcg", "mrr") for k in (1, 2, 5)}
            assert all(0 <= value <= 1 for value in metrics.values())
        assert stored[part] == getattr(result, part)
    assert [entry["epoch"] for entry in stored["log"]] == [0, 1, 2]
    for entry in stored["log"]:
        assert {"rec", "contrastive", "diffusion"} <= entry["loss"].keys()
        assert entry["seconds"] > 0
    best = max(range(3), key=lambda epoch: stored["log"][epoch]["valid"]["ndcg@5"])
    assert stored["best_epoch"] == best
    assert stored["valid"][KEPT] == stored["log"][best]["valid"]
    assert stored["epochs"] == 3
    assert stored["statistics"] == {
        "users": 6,
        "items": 12,
        "actions": 30,
        "pairs": 30,
        "ties": 0,
    }
    assert stored["versions"]["recbole_simdiff"] == version
    assert {"python", "torch", "recbole", "numpy", "pandas"} <= stored["versions"].keys()
    assert stored["config"]["model"] == "SimDiffRec"
    assert stored["config"]["values"]["seed"] == 2020
    assert stored["peak_memory_mb"] > 10
    assert stored["peak_gpu_memory_mb"] == 0  # without a GPU
    assert stored["seconds"] >= sum(entry["seconds"] for entry in stored["log"]) * 0.99


def test_a_run_folder_holds_two_checkpoints_a_result_and_a_log(go: Any) -> None:
    result, _ = go()
    folder = Path(result.run_dir)
    assert {path.name for path in folder.iterdir()} == {BEST, LAST, RESULT, f"{folder.name}.log"}
    log = (folder / f"{folder.name}.log").read_text()
    assert "6 users, 12 items, 30 actions" in log
    assert log.count("train epoch") == 2


def test_parallel_runs_get_folders_of_their_own(go: Any) -> None:
    """Two in the same second, of the same model."""
    assert go(epochs=1)[0].run_dir != go(epochs=1)[0].run_dir


def test_a_name_that_was_drawn_before_is_drawn_anew(
    go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts in one second that draw the same: neither writes into the other's folder."""
    module = sys.modules["recbole_simdiff.runs.folder"]
    monkeypatch.setattr(module, "time", SimpleNamespace(strftime=lambda *_: "now"))
    drawn = iter(["beef", "beef", "beef", "f00d"])
    monkeypatch.setattr(module, "secrets", SimpleNamespace(token_hex=lambda _: next(drawn)))
    one, other = (Path(go(epochs=1)[0].run_dir).name for _ in range(2))
    assert one == "SimDiffRec-toy-now-beef"
    assert other == "SimDiffRec-toy-now-f00d"


def test_one_process_trains_in_a_folder(go: Any, make_config: Any) -> None:
    """A second one is refused before it reads or writes anything; afterwards it may go on."""
    run_dir, begun = Path(go(epochs=2)[0].run_dir), []

    def second(_: Any) -> None:
        before = {path: path.read_bytes() for path in run_dir.iterdir()}
        message = f"another process trains in {run_dir}; wait for it, or stop it"
        with pytest.raises(UserError, match=re.escape(message)):
            run(make_config(epochs=9), resume=run_dir / LAST)
        assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
        begun.append(True)

    link = Path("link")  # the folder by another name
    link.symlink_to(run_dir)
    run(make_config(epochs=3), resume=link / LAST, listeners=[OnValidation(second)])
    run(make_config(epochs=4), resume=run_dir / LAST)
    assert begun
    with claimed(run_dir):  # another folder is not concerned
        run(make_config(epochs=1), run_dir=run_dir.parent / "mine")


def test_the_next_start_sweeps_what_a_killed_one_left(go: Any, make_config: Any) -> None:
    """Also of files that it will not write itself."""
    run_dir = Path(go(epochs=2)[0].run_dir)
    left = run_dir / ".best.safetensors.ab_c1234.tmp"
    left.mkdir()
    (left / ".tmpAbCd12").touch()
    run(make_config(epochs=2), resume=run_dir / LAST)
    assert not left.exists()


@pytest.mark.parametrize("model", ["SimDiffRec", "SASRec"])
def test_the_seed_decides(go: Any, model: str) -> None:
    """Of the losses by order and dropout; of metrics, at this rate, by initial weights alone."""
    first, second, other = (go(model, seed=seed, learning_rate=1e-9)[1] for seed in (1, 1, 2))

    def numbers(stored: dict[str, Any]) -> Any:
        return [stored["test"], stored["valid"], [entry["loss"] for entry in stored["log"]]]

    assert numbers(first) == numbers(second)
    assert numbers(first)[2] != numbers(other)[2]
    assert numbers(first)[:2] != numbers(other)[:2]


def test_the_test_part_is_read_once_and_last(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an epoch could be chosen by it."""
    order: list[str] = []
    collect = Evaluator._collect

    def record(self: Any, data: Any, *rest: Any) -> Any:
        lengths = data._dataset.inter_feat["item_length"]
        order.append(f"{len(lengths)} rows")  # toy: 4 users have a validation item, 5 a test item
        return collect(self, data, *rest)

    monkeypatch.setattr(Evaluator, "_collect", record)
    go(epochs=3, stopping_step=99)
    assert order == ["4 rows"] * 4 + ["5 rows"]


def test_a_run_without_its_test_is_tested_later_and_not_trained_again(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config("SASRec")
    wanted = run(config)
    reports: list[Path] = []
    untested = run_once(
        config,
        tmp_path / "one",
        listeners=[OnValidation(lambda _: reports.append(tmp_path))],
        test=False,
    )
    assert len(reports) == 2
    assert (untested.tested, untested.test, untested.by_length) == (False, {}, {})
    assert untested.valid == wanted.valid
    assert run_once(config, tmp_path / "one", test=False) == untested
    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_train_epoch", None)
        tested = run_once(config, tmp_path / "one")
        assert run_once(config, tmp_path / "one") == tested
        assert run_once(config, tmp_path / "one", test=False) == tested
    assert (tested.tested, tested.test) == (True, wanted.test)
    assert (tested.epochs, tested.best_epoch) == (wanted.epochs, wanted.best_epoch)
    stored = json.loads((tmp_path / "one" / RESULT).read_text())
    assert [entry["epoch"] for entry in stored["log"]] == [0, 1]
    assert not evaluate(tmp_path / "one", test=False).tested
    assert evaluate(tmp_path / "one", test=False).test == {}


def test_each_evaluation_is_reported_once_its_state_is_saved(
    make_config: Any, tmp_path: Path
) -> None:
    """What the report raises ends the training; it can be continued."""
    config = make_config("SASRec", epochs=5, eval_step=2, stopping_step=9)
    seen: list[tuple[int, int]] = []

    def report(progress: Any) -> None:
        _, stored = checkpoint.load(tmp_path / "one" / LAST)
        assert stored["progress"]["epoch"] == progress.epoch == len(progress.log)
        assert progress.log[-1]["valid"].keys() == progress.best_result.keys()
        seen.append((progress.epoch, progress.misses))
        if len(seen) == 1:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        run_once(config, tmp_path / "one", listeners=[OnValidation(report)])
    assert [epoch for epoch, _ in seen] == [2]
    result = run_once(config, tmp_path / "one", listeners=[OnValidation(report)])
    assert [epoch for epoch, _ in seen] == [2, 4]
    assert result.valid == run(config).valid


# What libraries say: PyTorch when it is asked for more than any machine has, and on a GPU.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.00 GiB of "
    "which 1.25 GiB is free."
)


def ask_for_too_much(*_: Any) -> Any:
    torch.empty(10**14)


def gpu_is_full(*_: Any) -> Any:
    raise torch.OutOfMemoryError(CUDA)


def numpy_fails(*_: Any) -> Any:
    np.empty(10**14)


@pytest.mark.parametrize(
    ("fail", "asked", "free"),
    [
        (ask_for_too_much, "400000000000000 bytes", r"\d+ bytes"),
        (numpy_fails, "728. TiB", r"\d+ bytes"),
        (gpu_is_full, "2.00 GiB", "1.25 GiB"),
    ],
)
@pytest.mark.parametrize("place", ["calculate_loss", "full_sort_predict"])
def test_memory_that_runs_out_is_told_in_one_message(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, place: str, fail: Any, asked: str, free: str
) -> None:
    """In the loss of the second epoch, or when that is evaluated; from the checkpoint, too."""
    config, calls = make_config(epochs=9), []
    stock = getattr(config.model_class, place)

    def later(self: Any, batch: Any) -> Any:
        calls.append(batch)
        return fail() if len(calls) > 4 else stock(self, batch)

    monkeypatch.setattr(config.model_class, place, later)
    message = (
        rf"^out of memory: {asked} requested, {free} free\. Reduce train_batch_size=4, "
        r"eval_batch_size=\d+, MAX_ITEM_LIST_LENGTH=4\. \S+/{} holds the last good state$"
    )
    with pytest.raises(OutOfMemory, match=message.format(LAST)):
        run(config, run_dir=Path("run"))
    if place == "full_sort_predict":
        with pytest.raises(OutOfMemory, match=message.format(BEST)):
            evaluate("run")
        with pytest.raises(OutOfMemory, match=f"^out of memory: {asked} requested"):
            load("run").recommend([["i1"]])


def test_other_errors_stay_what_they_are(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()

    def fail(*_: Any) -> Any:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(config.model_class, "calculate_loss", fail)
    with pytest.raises(RuntimeError, match="the size of tensor a must match"):
        run(config)


def test_the_best_epoch_is_tested_and_not_the_last(go: Any, monkeypatch: Any) -> None:
    """The second epoch's weights are ruined on purpose."""
    stock = PlanTrainer._train_epoch

    def ruin(self: Any, data: Any, epoch: int, *rest: Any) -> Any:
        means = stock(self, data, epoch, *rest)
        if epoch == 1:
            for parameter in self.model.parameters():
                parameter.data.zero_()
        return means

    wanted = go(epochs=1)[0].test
    monkeypatch.setattr(PlanTrainer, "_train_epoch", ruin)
    result, stored = go(epochs=2)
    assert [entry["epoch"] for entry in stored["log"]] == [0, 1]
    assert stored["best_epoch"] == 0
    assert result.test == wanted


def test_without_a_validation_part(go: Any) -> None:
    result, stored = go(eval_args=split("test_only"))
    assert stored["best_epoch"] is None
    assert stored["epochs"] == 2
    assert stored["valid"] == {}
    assert stored["test"].keys() == {KEPT, REMOVED}
    assert "test" in result.table()


def test_without_a_test_part(go: Any) -> None:
    result, stored = go(eval_args=split("valid_only"))
    assert stored["test"] == {}
    assert stored["valid"].keys() == {KEPT, REMOVED}
    assert "valid" in result.table()


def test_a_run_too_short_for_a_validation_is_validated_at_its_end(go: Any) -> None:
    _, stored = go(epochs=2, eval_step=3)
    assert stored["epochs"] == 2
    assert stored["best_epoch"] == 1
    assert stored["test"].keys() == {KEPT, REMOVED}


def test_sampled_rankings_have_one_protocol(go: Any) -> None:
    """There is no history to remove from a handful of drawn items; each part says what is drawn."""
    modes = {"mode": {"valid": "pop2", "test": "uni3"}}
    result, stored = go("SASRec", eval_args=split("valid_and_test") | modes)
    names = ["history kept, 2 negatives by popularity", "history kept, 3 uniform negatives"]
    assert [*stored["valid"], *stored["test"]] == names
    assert all(name in result.table() for name in names)
    assert evaluate(result.run_dir).table() == result.table()
    assert stored["valid"][names[0]] == stored["log"][stored["best_epoch"]]["valid"]
    log = (Path(result.run_dir) / f"{Path(result.run_dir).name}.log").read_text()
    assert log.count("(history kept, 2 negatives by popularity)") == 2
    # Earlier versions called every protocol as if all items were ranked.
    for part in ("valid", "test"):
        stored[part] = {KEPT: next(iter(stored[part].values()))}
    (Path(result.run_dir) / RESULT).write_text(json.dumps(stored))
    again = read_result(Path(result.run_dir))
    assert (again.valid, again.test) == (result.valid, result.test)


def test_one_part_ranked_in_full_and_one_among_few(go: Any) -> None:
    _, stored = go(eval_args=split("valid_and_test") | {"mode": {"valid": "uni3", "test": "full"}})
    assert list(stored["valid"]) == ["history kept, 3 uniform negatives"]
    assert list(stored["test"]) == list(PROTOCOLS)


@pytest.mark.parametrize("model", ["SimDiffRec", "SASRec"])
def test_training_on_everything(go: Any, model: str) -> None:
    """All epochs are trained, nothing is measured, and what comes out recommends."""
    everything = {"split": {"RS": [1, 0, 0]}, "order": "TO", "group_by": "user", "mode": "full"}
    result, stored = go(model, eval_args=everything, epochs=3, stopping_step=1)
    assert (stored["valid"], stored["test"], stored["by_length"]) == ({}, {}, {})
    assert (stored["epochs"], stored["best_epoch"]) == (3, None)
    assert result.table() == "nothing was validated or tested"
    log = (Path(result.run_dir) / f"{Path(result.run_dir).name}.log").read_text()
    assert "trained on everything for epochs=3; nothing is validated or tested: eval_args" in log
    assert len(load(result.run_dir).recommend([["i1", "i2"]], k=3)[0].items) == 3
    with pytest.raises(UserError, match=r"was trained on everything.*split=\{'RS': \[1, 0, 0\]\}"):
        evaluate(result.run_dir)


def test_evaluate_repeats_the_numbers_and_writes_nothing(go: Any, tmp_path: Path) -> None:
    result, stored = go(epochs=2)

    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    before = files()
    assert Path(result.run_dir) / RESULT in before
    for place in (Path(result.run_dir), Path(result.run_dir) / BEST):
        again = evaluate(place)
        assert (again.valid, again.test) == (stored["valid"], stored["test"])
        assert again.best_epoch == stored["best_epoch"]
    assert files() == before


def test_evaluate_can_measure_at_other_cutoffs(go: Any) -> None:
    result, stored = go()
    other = evaluate(result.run_dir, {"topk": [5, 7], "eval_batch_size": 2})
    assert other.test[KEPT]["hit@7"] >= other.test[KEPT]["hit@5"]
    assert other.test[KEPT]["hit@5"] == pytest.approx(stored["test"][KEPT]["hit@5"])


def test_evaluate_refuses_what_the_checkpoint_fixes(go: Any) -> None:
    result, _ = go(epochs=1)
    with pytest.raises(UserError, match=r"seed cannot be changed here: .* Allowed: data_path"):
        evaluate(result.run_dir, {"seed": 1})


def test_evaluate_refuses_other_data(go: Any, data_path: Path) -> None:
    result, _ = go(epochs=1)
    path = data_path / "toy" / "toy.inter"
    path.write_text(path.read_text().replace("i9", "j9"))
    with pytest.raises(UserError, match=r"is not the one .* it has 6 users, 12 items, .* the ch"):
        evaluate(result.run_dir)


def test_a_checkpoint_of_another_shape_is_refused(go: Any) -> None:
    result, _ = go(epochs=1)
    path = Path(result.run_dir) / BEST
    tensors, content = checkpoint.load(path)
    name = "model.item_embedding.weight"
    checkpoint.save(path, tensors | {name: tensors[name][:, :4]}, content)
    with pytest.raises(UserError, match=r"fit: item_embedding\.weight has shape \(13, 4\), the"):
        evaluate(result.run_dir)
    del tensors[name]
    checkpoint.save(path, tensors, content)
    with pytest.raises(UserError, match=r"does not fit the model: it lacks 'item_embedding\.weigh"):
        evaluate(result.run_dir)


def test_the_table_is_aligned_and_rounded() -> None:
    results = {"valid": {KEPT: {"hit@5": 1 / 3}}, "test": {KEPT: {"hit@5": 0.5}}}
    assert format_table(results, 3).splitlines() == [
        "split  protocol      hit@5",
        "valid  history kept  0.333",
        "test   history kept  0.500",
    ]


# ---------------------------------------------------------------------- groups by input length


def test_groups_by_input_length_are_in_the_result(go: Any) -> None:
    """toy has test rows of 2, 3, 4, 6 and 8 earlier items, of which 4 are read."""
    result, stored = go(length_groups=[2, 3])
    assert stored["by_length"] == result.by_length
    assert {group: values["rows"] for group, values in result.by_length.items()} == {
        "1-2": 1,
        "3-3": 1,
        "4+": 3,
    }
    for metric, value in result.test[KEPT].items():
        total = sum(part["rows"] * part[metric] for part in result.by_length.values())
        assert total / 5 == pytest.approx(value)
    again = evaluate(result.run_dir)
    assert again.by_length == result.by_length
    other = evaluate(result.run_dir, {"length_groups": []})
    assert other.by_length == {"1+": {"rows": 5, **result.test[KEPT]}}


def test_without_a_test_part_there_are_no_groups(go: Any) -> None:
    assert go(eval_args=split("valid_only"))[1]["by_length"] == {}


# ---------------------------------------------------------------------- sampling seeds


class Drawing:
    """An evaluator of a model whose scores depend on its sampling seed, and nothing else of one."""

    def __init__(self, seeds: int) -> None:
        self.model, self.seed = self, 7
        self.config = {"sampling_seeds": seeds, "sampling_seed": 7, "length_groups": [5]}
        self.config["show_progress"] = False
        self.asked: list[tuple[str, int]] = []

    def reseed_sampling(self, seed: int) -> bool:
        self.seed = seed
        return True

    def _found(self, data: str) -> dict[str, float]:
        self.asked.append((data, self.seed))
        return {"hit@5": 0.1 * self.seed, "ndcg@5": self.seed**-2}

    def evaluate(self, data: str, protocols: Any, show: bool) -> Any:
        found = self._found(data)
        return dict.fromkeys(protocols, found)

    def evaluate_in_detail(self, data: str, bounds: list[int], show: bool) -> Any:
        return {KEPT: self._found(data), REMOVED: {}}, {"1-5": {"rows": 2}}, {}


def test_the_spread_over_sampling_seeds() -> None:
    """Of the test part only; the model's own seed is the first, and is put back."""
    trainer: Any = Drawing(4)
    found = evaluate_splits(trainer, "valid", "test")
    assert trainer.seed == 7
    assert trainer.asked == [("valid", 7), ("test", 7), ("test", 8), ("test", 9), ("test", 10)]
    assert found.splits["test"][KEPT]["hit@5"] == pytest.approx(0.7)
    assert found.sampling["seeds"] == [7, 8, 9, 10]
    for name, values in (
        ("hit@5", [0.1 * seed for seed in (7, 8, 9, 10)]),
        ("ndcg@5", [seed**-2 for seed in (7, 8, 9, 10)]),
    ):
        assert found.sampling[name]["mean"] == pytest.approx(statistics.fmean(values))
        assert found.sampling[name]["std"] == pytest.approx(statistics.stdev(values))


def test_one_sampling_seed_has_no_spread() -> None:
    trainer: Any = Drawing(1)
    assert evaluate_splits(trainer, "valid", "test").sampling == {}
    assert trainer.asked == [("valid", 7), ("test", 7)]
    trainer = Drawing(3)
    assert evaluate_splits(trainer, "valid", None).sampling == {}


def test_a_model_that_draws_when_it_scores(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own keys may be changed at evaluation, and the spread is in the result."""
    score, seeds = SimDiffRec.full_sort_predict, [3]

    def noisy(self: Any, batch: Any) -> Any:
        generator = torch.Generator().manual_seed(seeds[-1])
        scores = score(self, batch)
        return scores + torch.randn(scores.shape, generator=generator)

    monkeypatch.setattr(SimDiffRec, "full_sort_predict", noisy)
    monkeypatch.setattr(SimDiffRec, "reseed_sampling", lambda _, seed: not seeds.append(seed))
    monkeypatch.setattr(SimDiffRec, "evaluation_keys", ("sampling_seeds", "tau"))
    drawing = {"sampling_seed": 3, "sampling_seeds": 1}
    monkeypatch.setitem(SMALL, "sampling_seeds", 1)
    stock = layers.read_yaml
    monkeypatch.setattr(
        config_module,
        "read_yaml",
        lambda path: stock(path) | (drawing if str(path).endswith("all.yaml") else {}),
    )
    result, stored = go(epochs=1, sampling_seeds=3)
    assert stored["sampling"] == result.sampling
    assert result.sampling["seeds"] == [3, 4, 5]
    assert result.sampling.keys() == {"seeds", *result.test[KEPT]}
    assert any(part["std"] > 0 for name, part in result.sampling.items() if name != "seeds")
    assert evaluate(result.run_dir).sampling == result.sampling
    two = evaluate(result.run_dir, {"sampling_seeds": 2, "tau": 0.5}).sampling
    assert two["seeds"] == [3, 4]
    with pytest.raises(UserError, match=r"k_noise cannot be changed.*length_groups, .*sampling_se"):
        evaluate(result.run_dir, {"k_noise": 2})


def test_models_that_draw_nothing_have_no_spread(go: Any) -> None:
    assert go(epochs=1)[1]["sampling"] == {}


# ---------------------------------------------------------------------- invented items


@pytest.mark.parametrize("model", ["SimDiffRec", "SASRec"])
def test_invented_items_of_nobody_change_no_number(make_config: Any, model: str) -> None:
    """DiffuASR T24: neither losses nor metrics, with both kinds of training loader."""
    config = make_config(
        "DiffuASR",
        backbone=model,
        **({"k_noise": 3} if model == "SimDiffRec" else {}),
        augmenter="random",
    )
    plain = run(config.backbone())
    result = run(config, pseudo=torch.zeros(7, 3, dtype=torch.long))
    losses = [
        [entry["loss"] for entry in json.loads((Path(r.run_dir) / RESULT).read_text())["log"]]
        for r in (plain, result)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert (plain.valid, plain.test) == (result.valid, result.test)


def test_invented_items_stay_with_the_run(make_config: Any) -> None:
    """The checkpoint has them, and what is known of them; evaluation needs nothing else."""
    config = make_config("DiffuASR", augmenter="random", pseudo_at_evaluation=True)
    pseudo = torch.randint(1, 13, (7, 2))
    pseudo[0] = 0
    notes = {"backbone": "SASRec", "quality": {}}
    result = run(config, pseudo=pseudo, augmentation=notes)
    for name in (BEST, LAST):
        tensors, content = checkpoint.load(Path(result.run_dir) / name)
        assert torch.equal(tensors["data.pseudo"].long(), pseudo)
        assert content["augmentation"] == notes
    again = evaluate(result.run_dir)
    assert (again.valid, again.test, again.augmentation) == (result.valid, result.test, notes)
    other = run(config, pseudo=torch.where(pseudo > 0, pseudo % 12 + 1, 0))
    weights, others = (checkpoint.load(Path(r.run_dir) / BEST)[0] for r in (result, other))
    name = "model.position_embedding.weight"
    assert not torch.equal(weights[name], others[name])


def test_a_result_is_read_back(go: Any) -> None:
    result, _ = go(epochs=1)
    assert read_result(Path(result.run_dir)) == result
    path = Path(result.run_dir) / RESULT
    for content in ('{"valid"', None):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match=r"result\.json is not the result of a finished run"):
            read_result(path.parent)


def test_a_result_of_an_earlier_version_is_read_too(go: Any) -> None:
    """Fields that came later are empty; the log is no field."""
    result, stored = go(epochs=1)
    for key in ("by_length", "sampling", "augmentation"):
        del stored[key]
    path = Path(result.run_dir) / RESULT
    path.write_text(json.dumps(stored))
    assert read_result(path.parent).by_length == {}
    assert read_result(path.parent).test == result.test


# ---------------------------------------------------------------------- sampled rankings


def test_candidates_are_drawn_by_the_seed_alone(go: Any, make_config: Any) -> None:
    """Training that draws numbers of its own moves none: evaluated or resumed, it is as it was."""
    sampled = {"loss_type": "BPR", "eval_args": split("valid_and_test") | {"mode": "uni2"}}
    changes = sampled | {"epochs": 3, "stopping_step": 99}
    # Not trained to speak of, so that nothing but the candidates can change a rank.
    changes |= {"learning_rate": 1e-12, "metrics": ["NDCG", "MRR"], "topk": [3]}
    changes |= {"valid_metric": "MRR@3"}
    result, stored = go("SASRec", **changes)
    assert stored["log"][0]["valid"] == stored["log"][1]["valid"] == stored["log"][2]["valid"]
    again = evaluate(result.run_dir)
    assert (again.valid, again.test) == (result.valid, result.test)
    resumed = run(make_config("SASRec", **changes), resume=Path(result.run_dir) / LAST)
    assert (resumed.valid, resumed.test) == (result.valid, result.test)
    drawn = {
        next(iter(go("SASRec", **changes | {"seed": seed})[0].test.values()))["mrr@3"]
        for seed in range(4)
    }
    assert len(drawn) > 1


def test_rankings_are_saved_beside_metrics_of_ranks(go: Any) -> None:
    """GAUC goes through RecBole's collector, which keeps no rankings."""
    table = {}
    for metrics in (["GAUC", "NDCG"], ["NDCG"], ["GAUC", "NDCG", "ItemCoverage"]):
        result, stored = go(save_rankings=True, metrics=metrics)
        folder = Path(result.run_dir)
        files = (
            (folder / "ranks.csv").read_text(),
            gzip.decompress((folder / "lists.csv.gz").read_bytes()),
        )
        table[str(metrics)] = (files, stored["test"][KEPT]["ndcg@5"])
    assert table["['GAUC', 'NDCG']"] == table["['NDCG']"]
    assert table["['GAUC', 'NDCG', 'ItemCoverage']"] == table["['NDCG']"]


def test_changed_ready_made_rows_are_refused(make_config: Any, data_path: Path) -> None:
    """Same users and items, another target."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    files = {
        "train": ["u1\ti1\ti2", "u1\ti1 i2\ti3", "u2\ti4 i5\ti1"],
        "valid": ["u1\ti1 i2 i3\ti4", "u2\ti4 i5 i1\ti2"],
        "test": ["u1\ti1 i2 i3 i4\ti5", "u2\ti5 i1 i2\ti3"],
    }
    folder = data_path / "ready"
    folder.mkdir()
    for name, rows in files.items():
        (folder / f"ready.{name}.inter").write_text(header + "\n".join(rows) + "\n")
    result = run(
        make_config(
            dataset="ready",
            load_col={"inter": ["user_id", "item_id_list", "item_id"]},
            benchmark_filename=list(files),
            train_sampling="prefix_last",
        )
    )
    assert evaluate(result.run_dir).test == result.test
    path = folder / "ready.test.inter"
    path.write_text(path.read_text().replace("u2\ti5 i1 i2\ti3", "u2\ti5 i1 i2\ti4"))
    message = r"is not the one .* was trained on: it has 2 users, 5 items, 7 ready-made prefixes, "
    with pytest.raises(UserError, match=message + "the checkpoint 2 users, 5 items, 7 ready-made"):
        evaluate(result.run_dir)


def test_the_checksum_of_the_code_is_blind_to_layout(tmp_path: Path) -> None:
    """Files, imports, docstrings, comments and line breaks: no; values, names and order: yes."""

    def checksum(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, text in files.items():
            path = folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return source_checksum(folder)

    before = checksum(
        a='"""Module."""\nimport os\n\nK = 3\n\ndef f(x):\n    """Doc."""\n    return x + K\n',
        b="from a import f\n\n@f\nclass C:\n    y: int = 1  # why\n",
    )
    moved = checksum(
        room__c="from b import f\n@f\nclass C:\n    'Other.'\n    y: int = (\n        1\n    )\n",
        room__d="def f(x):\n    import sys\n    return x + K\n",
        a="K = 3\n",
    )
    assert moved == before
    a, f, c = "K = 3", "def f(x):\n    return x + K", "@f\nclass C:\n    y: int = 1"
    assert checksum(a=a, f=f, c=c) == before
    assert checksum(a="K = 4", f=f, c=c) != before
    assert checksum(a=a, f="def f(x):\n    return K + x", c=c) != before
    assert checksum(a=a, f=f, c="@f\nclass C:\n    z: int = 1") != before
    readers = {"experiments__plots": "def plot(): ...", "cli__main": "def main(): ..."}
    assert checksum(a=a, f=f, c=c, **readers) == before


def test_peak_memory_is_that_of_this_program_alone() -> None:
    """Not of the process that started it, with which the kernel's count of a child begins."""
    large = np.ones(100_000_000)  # 763 MiB
    code = "from recbole_simdiff.runs.result import peak_memory_mb; print(peak_memory_mb())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(out.stdout) < large.nbytes / 2**20
