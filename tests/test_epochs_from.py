"""``epochs_from``: a training without validation takes as long as a former one found best."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.runs.best_epochs import best_epochs, check_validated
from recbole_simdiff.runs.identity import fingerprint
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.run import run_one as run

EVERYTHING = {"split": {"RS": [1, 0, 0]}, "group_by": "user"}


@pytest.fixture
def source(make_config: Any) -> Path:
    """A finished run of four epochs."""
    return Path(run(make_config("SASRecCE", epochs=4)).run_dir)


def with_scores(folder: Path, log: list[tuple[str, float | None]], **values: Any) -> Path:
    """Change the result of a run: its log is (phase, score) of each epoch."""
    path = folder / "result.json"
    content = json.loads(path.read_text())
    content["config"]["values"] |= values
    entries = []
    for phase, score in log:
        entries.append({"phase": phase} | ({} if score is None else {"valid": {"ndcg@5": score}}))
    path.write_text(json.dumps(content | {"log": entries}))
    return folder


def test_it_trains_up_to_the_best_epoch(make_config: Any, source: Path) -> None:
    with_scores(source, [("train", s) for s in (0.1, 0.3, 0.3, 0.2)])
    result = run(make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source), epochs=50))
    assert result.epochs == 2
    (log,) = Path(result.run_dir).glob("*.log")
    assert f"epochs that {source} found best: train 2" in log.read_text()
    assert "trained on everything for epochs=train 2" in log.read_text()


def test_a_test_part_may_stay(make_config: Any, source: Path) -> None:
    with_scores(source, [("train", s) for s in (0.1, 0.2, 0.3, 0.2)])
    args = {"split": {"LS": "test_only"}}
    result = run(make_config("SASRecCE", eval_args=args, epochs_from=str(source / LAST)))
    assert result.epochs == 3
    assert result.test


ONE = [Phase("train", 9)]
REFINED = [Phase("first", 9), Phase("second", 9, refine=True)]
PRETRAINED = [Phase("pre", 9, evaluate=False), Phase("fine", 9)]
ANEW = [Phase("first", 9), Phase("second", 9)]


@pytest.mark.parametrize(
    ("phases", "log", "bigger", "expected"),
    [
        (ONE, [("train", 0.1), ("train", None), ("train", 0.2)], True, {"train": 3}),
        (ONE, [("train", 0.1), ("train", 0.3), ("train", 0.2)], False, {"train": 1}),
        # A second phase that refines begins with the best epoch of the first, whose score is to be
        # beaten; where it never was, the first one's weights are the result.
        (
            REFINED,
            [("first", 0.1), ("first", 0.4), ("first", 0.3), ("second", 0.4), ("second", 0.5)],
            True,
            {"first": 2, "second": 2},
        ),
        (
            REFINED,
            [("first", 0.4), ("first", 0.3), ("second", 0.2)],
            True,
            {"first": 1, "second": 0},
        ),
        # Otherwise with the last one's weights, and a best epoch of its own.
        (
            PRETRAINED,
            [("pre", None), ("pre", None), ("fine", 0.1), ("fine", 0.2), ("fine", 0.1)],
            True,
            {"pre": 2, "fine": 2},
        ),
        (
            ANEW,
            [("first", 0.9), ("first", 0.8), ("second", 0.2), ("second", 0.1)],
            True,
            {"first": 2, "second": 1},
        ),
    ],
)
def test_each_phase_has_its_epochs(
    make_config: Any,
    source: Path,
    phases: list[Phase],
    log: list[tuple[str, float | None]],
    bigger: bool,
    expected: dict[str, int],
) -> None:
    with_scores(source, log, valid_metric_bigger=bigger)
    config = make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source))
    assert best_epochs(config, phases) == expected


@pytest.mark.parametrize(
    ("phases", "log", "name"),
    [
        (REFINED, [("first", None), ("first", None), ("second", 0.2)], "first"),
        (ANEW, [("first", 0.1), ("first", 0.2), ("second", None)], "second"),
    ],
)
def test_a_phase_that_was_never_validated_has_no_best_epoch(
    make_config: Any,
    source: Path,
    phases: list[Phase],
    log: list[tuple[str, float | None]],
    name: str,
) -> None:
    with_scores(source, log, eval_step=5)
    config = make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source))
    n_epochs = sum(phase == name for phase, _ in log)
    expected = rf"phase {name} was never validated \(epochs={n_epochs}, eval_step=5\)"
    with pytest.raises(UserError, match=expected):
        best_epochs(config, phases)


def test_a_refining_phase_that_was_never_validated_is_left_out(
    make_config: Any, source: Path
) -> None:
    """Its source's result are the best weights of the phase before."""
    with_scores(source, [("first", 0.3), ("first", 0.2), ("second", None)])
    config = make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source))
    assert best_epochs(config, REFINED) == {"first": 1, "second": 0}


def test_a_plan_that_is_validated_too_late_is_refused(make_config: Any) -> None:
    short = [Phase("first", 2), Phase("second", 9, refine=True)]
    config = make_config("SASRecCE", epochs=9, eval_step=3)
    for phases in (short, short[:1], [Phase("pre", 9), *short[:1]]):
        with pytest.raises(
            UserError, match=r"phase first .* has 2 epochs and would never .*step=2"
        ):
            check_validated(config, phases)
    check_validated(config, [short[0], Phase("second", 9)])  # its last weights go on
    check_validated(config, [Phase("first", 9), Phase("second", 2, refine=True)])
    check_validated(config, [short[0]._replace(evaluate=False), short[1]])
    check_validated(make_config("SASRecCE", epochs=9, eval_step=2), short)


def test_a_model_of_two_phases(make_config: Any) -> None:
    """ECLSR's second phase refines the first."""
    source = run(make_config("ECLSR", epochs=3, stages=2))
    given = {"eval_args": EVERYTHING, "epochs_from": source.run_dir}
    result = run(make_config("ECLSR", epochs=40, stages=2, **given))
    log = json.loads((Path(result.run_dir) / "result.json").read_text())["log"]
    assert 1 <= result.epochs <= source.epochs
    assert {entry["phase"] for entry in log} <= {
        entry["phase"]
        for entry in json.loads((Path(source.run_dir) / "result.json").read_text())["log"]
    }


def test_a_resumed_run_needs_no_source(make_config: Any, source: Path) -> None:
    with_scores(source, [("train", s) for s in (0.1, 0.2, 0.3, 0.2)])
    config = make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source))
    last = Path(run(config).run_dir) / LAST
    shutil.rmtree(source)
    assert run(resumed_config(last, {}), resume=last).epochs == 3
    with pytest.raises(UserError, match="epochs=9 has no effect here: epochs_from="):
        resumed_config(last, {"epochs": 9})


def test_its_scores_name_the_result(make_config: Any, source: Path) -> None:
    config = make_config("SASRecCE", eval_args=EVERYTHING, epochs_from=str(source))
    names = {fingerprint(config, "data")}
    for best in (0.3, 0.4):
        with_scores(source, [("train", 0.1), ("train", best)])
        names.add(fingerprint(config, "data"))
    assert len(names) == 3


def test_what_cannot_be_used_is_refused(make_config: Any, source: Path, tmp_path: Path) -> None:
    def refused(message: str, model: str = "SASRecCE", **values: Any) -> None:
        given = {"eval_args": EVERYTHING, "epochs_from": str(source)} | values
        with pytest.raises(UserError, match=message):
            run(make_config(model, **given))

    refused("is not the result of a finished run", epochs_from=str(tmp_path))
    refused("epochs_from=2 must be text", epochs_from=2)
    refused("it is a run of model=SASRecCE, not CL4SRec", "CL4SRec")
    refused("replaces validation", eval_args={"split": {"LS": "valid_and_test"}})
    refused("not available for DiffuASR", "DiffuASR", backbone="SASRecCE")
    served = run(make_config("SASRecCE", eval_args=EVERYTHING)).run_dir
    refused("it was not validated", epochs_from=served)
    with_scores(source, [("other", 0.1)])
    refused("its phases are other, here they are train")
