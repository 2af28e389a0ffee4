"""The command line: exit codes, what is printed where, and messages a stranger can act on."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.cli import main
from recbole_simdiff.run import RESULT
from recbole_simdiff.trainer import LAST, PlanTrainer, TrainingDiverged
from tests.conftest import SEQUENCES, SMALL, write_inter


def arguments(folder: Path, **changes: Any) -> list[str]:
    """The small settings as a command line for toy in ``folder``."""
    values = SMALL | {
        "data_path": str(folder / "dataset"),
        "checkpoint_dir": str(folder / "saved"),
        "epochs": 1,
    }
    return ["--dataset=toy", *(f"--{key}={value}" for key, value in (values | changes).items())]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on toy, made by the default command."""
    folder = tmp_path_factory.mktemp("cli")
    write_inter(folder / "dataset", "toy", SEQUENCES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(arguments(folder)) == 0
    (place,) = (folder / "saved").iterdir()
    return place


def saved(folder: Path) -> list[Path]:
    """All files of runs below ``folder``."""
    return [path for path in (folder / "saved").rglob("*") if (folder / "saved").exists()]


class Output:
    """Exit code, standard output and standard error of a command."""

    def __init__(self, code: int, captured: Any) -> None:
        self.code, self.out, self.err = code, captured.out, captured.err
        assert "Traceback" not in self.out + self.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """call(*arguments) -> Output; the exits of argparse count as return values."""

    def run(*given: str) -> Output:
        try:
            code = main(given)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Output(code, capsys.readouterr())

    return run


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("given", "mentions"),
    [
        (
            ["--help"],
            ["train", "evaluate", "recommend", "list", "--resume=saved/<run>", "examples"],
        ),
        (
            ["train", "--help"],
            ["--model", "--dataset", "--config_files", "--resume", "--key=value"],
        ),
        (["evaluate", "--help"], ["--checkpoint", "run folder"]),
        (
            ["recommend", "--help"],
            [
                "--checkpoint",
                "--users",
                "--history",
                "--input",
                "--k",
                "--seen",
                "--format",
                "JSON",
            ],
        ),
        (["list", "--help"], ["--explain", "--model", "--dataset"]),
    ],
)
def test_help_names_what_a_command_takes(call: Any, given: list[str], mentions: list[str]) -> None:
    found = call(*given)
    assert found.code == 0
    for word in mentions:
        assert word in found.out, word


# ---------------------------------------------------------------------- train


def test_train_prints_both_protocols_and_the_folder(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    found = call("train", *arguments(tmp_path, epochs=2))
    assert found.code == 0
    assert "SimDiffRec on toy: best epoch" in found.out
    assert "of 2," in found.out
    rows = [line.split()[:3] for line in found.out.splitlines() if "history" in line]
    assert rows == [
        [part, "history", protocol]
        for part in ("valid", "test")
        for protocol in ("kept", "removed")
    ]
    (place,) = (tmp_path / "saved").iterdir()
    assert f"checkpoints and result.json: {place}" in found.out
    assert "train epoch   1" in found.err


def test_train_is_the_default_command(run_dir: Path) -> None:
    """The fixture names no command."""
    assert (run_dir / RESULT).is_file()
    assert run_dir.name.startswith("SimDiffRec-toy-")


def test_key_and_value_may_be_two_words(call: Any, tmp_path: Path, data_path: Path) -> None:
    given = [part for text in arguments(tmp_path, seed=5) for part in text.split("=", 1)]
    assert call(*given).code == 0
    (result,) = (tmp_path / "saved").glob(f"*/{RESULT}")
    assert json.loads(result.read_text())["config"]["values"]["seed"] == 5


def test_config_files_come_before_the_command_line(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\ntau: 0.5\nk_noise: 2\n")
    (tmp_path / "b.yaml").write_text("seed: 2\ntau: 0.6\n")
    given = [a for a in arguments(tmp_path, seed=3) if not a.startswith("--k_noise")]
    assert (
        call(*given, "--config_files", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")).code == 0
    )
    (result,) = (tmp_path / "saved").glob(f"*/{RESULT}")
    values = json.loads(result.read_text())["config"]["values"]
    assert (values["seed"], values["tau"], values["k_noise"]) == (3, 0.6, 2)


def test_show_users_prints_their_next_items(call: Any, tmp_path: Path, data_path: Path) -> None:
    found = call(*arguments(tmp_path, show_users=2))
    assert "user a, newest of 9:\n    i5\n    i6\n    i7\n    i8\n    i9\n" in found.out
    assert found.out.count("recommended next:") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--epoch=3"],
            "unknown key 'epoch' (command line) for model=SimDiffRec; did you mean epochs?",
        ),
        (["--learning_rte=1"], "did you mean learning_rate?"),
        (["--qqqqqq=1"], "unknown key 'qqqqqq' (command line) for model=SimDiffRec"),
        (["--modl=SASRec"], "unknown key 'modl'"),
        (["--mod=SASRec"], "unknown key 'mod'"),
        (["--datase=toy2"], "unknown key 'datase'"),
        (["--epochs=many"], "epochs='many' (command line) must be a whole number; the default is"),
        (["--epochs=0"], "epochs=0 (command line) must be at least 1"),
        (["--learning_rate=fast"], "learning_rate='fast' (command line) must be a number"),
        (["--enable_amp=2"], "enable_amp=2 (command line) must be true or false"),
        (["--tau=0"], "tau=0.0 must be positive"),
        (["--sr_loss=BPR"], "sr_loss='BPR' is not one of CE, BCE"),
        (["--preset=none"], "preset='none' (command line) is not one of paper, official"),
        (["--valid_metric=NDCG@7"], "valid_metric=NDCG@7 (command line) must be one of metrics="),
        (["--model=SimDifRec"], "Did you mean SimDiffRec"),
        (["--model=BPR"], "model='BPR' is not a sequential model of recbole_simdiff or RecBole."),
        (["--dataset=toy2"], "dataset='toy2' is not there:"),
        (["--config_files", "gone.yaml"], "cannot read the configuration file gone.yaml"),
        (["epochs=3"], "'epochs=3' is not of the form --key=value"),
        (["--epochs"], "--epochs needs a value: --epochs=value"),
        (["--seed=1", "--seed=2"], "--seed is given twice: 1 and 2"),
        (["--k_noise=12"], "k_noise=12 must be smaller than the number of items"),
        (["--TIME_FIELD=time"], "the time column 'time' is not loaded"),
    ],
)
def test_a_mistake_costs_one_line_and_leaves_nothing_behind(
    call: Any, tmp_path: Path, data_path: Path, given: list[str], message: str
) -> None:
    keys = {argument.partition("=")[0] for argument in given}
    small = [a for a in arguments(tmp_path) if a.partition("=")[0] not in keys]
    found = call(*small, *given)
    assert found.code == 2
    (line,) = [text for text in found.err.splitlines() if text.startswith("error: ")]
    assert message in line
    assert saved(tmp_path) == []


def test_a_diverged_training_fails_with_code_1(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise TrainingDiverged("loss part 'rec' is nan")

    monkeypatch.setattr(PlanTrainer, "fit", diverge)
    found = call(*arguments(tmp_path))
    assert found.code == 1
    assert "error: loss part 'rec' is nan" in found.err


# ---------------------------------------------------------------------- evaluate


def test_evaluate_prints_the_runs_own_numbers(call: Any, run_dir: Path) -> None:
    result = json.loads((run_dir / RESULT).read_text())
    found = call("evaluate", f"--checkpoint={run_dir}")
    assert found.code == 0
    rows = {
        (row[0], " ".join(row[1:3])): row[3:]
        for row in map(str.split, found.out.splitlines())
        if row and row[0] in ("valid", "test")
    }
    assert rows.keys() == {(s, p) for s in ("valid", "test") for p in result["test"]}
    for (part, protocol), values in rows.items():
        assert values == [f"{value:.4f}" for value in result[part][protocol].values()]


def test_evaluate_takes_evaluation_keys_only(call: Any, run_dir: Path) -> None:
    found = call("evaluate", f"--checkpoint={run_dir}", "--topk=[3]", "--valid_metric=NDCG@3")
    assert found.code == 0
    assert "ndcg@3" in found.out
    found = call("evaluate", f"--checkpoint={run_dir}", "--hidden_size=3")
    assert found.code == 2
    assert "--hidden_size cannot be changed here: the checkpoint fixes it." in found.err


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_missing_checkpoint_is_named(call: Any, tmp_path: Path, command: str) -> None:
    found = call(command, f"--checkpoint={tmp_path}")
    assert found.code == 2
    assert re.search(r"error: no checkpoint at .*best\.safetensors; give a run folder", found.err)
    found = call(command)
    assert found.code == 2
    assert "--checkpoint" in found.err


@pytest.mark.parametrize("command", ["evaluate", "recommend"])
def test_a_file_that_is_no_checkpoint_is_refused(call: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"\x80\x04junk")
    found = call(command, f"--checkpoint={tmp_path}")
    assert found.code == 2
    assert "pickled .pth files are never opened" in found.err


# ---------------------------------------------------------------------- recommend


@pytest.fixture
def recommend(call: Any, run_dir: Path) -> Any:
    """recommend(*arguments) -> Output on the finished run."""
    return lambda *given: call("recommend", f"--checkpoint={run_dir}", "--use_gpu=false", *given)


def test_recommend_to_users(recommend: Any) -> None:
    found = recommend("--users=a,e", "--k=3", "--format=json")
    assert found.code == 0
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert [row["history"] for row in rows] == ["user a", "user e"]
    assert set(rows[0]["items"]) == {"i10", "i11", "i12"}  # a has seen all others
    assert len(rows[1]["items"]) == len(rows[1]["scores"]) == 3
    assert not set(rows[1]["items"]) & set(SEQUENCES["e"])


def test_recommend_to_histories(recommend: Any) -> None:
    found = recommend("--history=i1, i2", "--history=i3", "--k=2")
    lines = found.out.splitlines()
    assert [lines[0], lines[3]] == ["history 1", "history 2"]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == ["1", "2", "1", "2"]


def test_the_three_formats_agree(recommend: Any) -> None:
    given = ("--history=i1,i2", "--k=4")
    (row,) = map(json.loads, recommend(*given, "--format=json").out.splitlines())
    table = recommend(*given, "--format=table").out.splitlines()[1:]
    cells = list(csv.DictReader(io.StringIO(recommend(*given, "--format=csv").out)))
    assert [line.split()[2] for line in table] == row["items"]
    assert [line.split()[1] for line in table] == [f"{score:.4f}" for score in row["scores"]]
    assert [cell["item"] for cell in cells] == row["items"]
    assert [cell["rank"] for cell in cells] == ["1", "2", "3", "4"]
    assert [float(cell["score"]) for cell in cells] == pytest.approx(row["scores"], abs=1e-6)
    assert {cell["history"] for cell in cells} == {"history 1"}


def test_seen_items_can_be_kept(recommend: Any) -> None:
    given = ("--history=i1,i2", "--k=12", "--format=json")
    dropped, kept = (json.loads(recommend(*given, f"--seen={s}").out) for s in ("drop", "keep"))
    assert set(kept["items"]) - set(dropped["items"]) == {"i1", "i2"}


LINES = 'i1,i2\n\n["i3", "i4"]\n{"user": "u1", "items": ["i5"]}\n{"items": ["i6"]}\n"i7", i8 \n'
NAMES = ["line 1", "line 3", "u1", "line 5", "line 6"]
HISTORIES = [["i1", "i2"], ["i3", "i4"], ["i5"], ["i6"], ["i7", "i8"]]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_histories_are_read_line_by_line(
    recommend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """CSV, JSON lists and JSON objects, with or without a name."""
    (tmp_path / "histories").write_text(LINES)
    monkeypatch.setattr("sys.stdin", io.StringIO(LINES))
    place = str(tmp_path / "histories") if source == "file" else "-"
    found = recommend(f"--input={place}", "--format=json", "--k=12")
    assert found.code == 0
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert [row["history"] for row in rows] == NAMES
    for row, history in zip(rows, HISTORIES, strict=True):
        assert row["unknown"] == []
        assert {f"i{n}" for n in range(1, 13)} - set(row["items"]) == set(history)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["i1", ', "line 2: not JSON"),
        ('{"user": "u"}', 'line 2: expected [...] or {"items": [...]}'),
        ('{"items": "i1"}', 'line 2: expected [...] or {"items": [...]}'),
    ],
)
def test_a_malformed_line_is_named(recommend: Any, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "histories"
    path.write_text(f"i1\n{line}\n")
    found = recommend(f"--input={path}")
    assert found.code == 2
    assert found.out == ""
    assert f"error: {path}, {message}" in found.err


def test_unknown_items_are_reported_on_standard_error(recommend: Any) -> None:
    found = recommend("--history=i1,zz,i2,yy", "--history=zz", "--format=csv", "--k=1")
    assert found.code == 0
    assert len(found.out.splitlines()) == 2
    assert "history 1: 2 unknown items left out: zz, yy" in found.err
    assert "history 2: no known item in the history, no recommendation" in found.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to recommend to: give --users, --history or --input"),
        (["--users=zoe"], "user 'zoe' is not in the data set 'toy'"),
        (["--history=i1", "--k=0"], "k=0 must be at least 1"),
        (["--input=gone.csv"], "cannot read gone.csv"),
        (["--history=i1", "--topk=3"], "recommend does not know --topk; see recommend --help"),
        (["--history=i1", "--k=many"], "invalid int value: 'many'"),
        (["--history=i1", "--format=xml"], "invalid choice: 'xml'"),
    ],
)
def test_mistakes_of_recommend(recommend: Any, given: list[str], message: str) -> None:
    found = recommend(*given)
    assert found.code == 2
    assert found.out == ""
    assert message in found.err


def test_a_binary_input_is_refused(recommend: Any, tmp_path: Path) -> None:
    path = tmp_path / "histories"
    path.write_bytes(b"\xff\xfe\x00")
    found = recommend(f"--input={path}")
    assert found.code == 2
    assert f"cannot read {path}" in found.err


# ---------------------------------------------------------------------- list


def test_list_names_models_data_sets_and_presets(call: Any) -> None:
    found = call("list")
    assert found.code == 0
    lines = dict(line.split(":", 1) for line in found.out.splitlines())
    assert "SimDiffRec" in lines["models"]
    assert "SASRec" in lines["RecBole's models"]
    assert "SimDiffRec" not in lines["RecBole's models"]
    assert "amazon-beauty" in lines["data sets with settings here"]
    assert "official" in lines["presets of SimDiffRec"]


def explained(text: str) -> dict[str, tuple[str, str]]:
    """Key -> (value, origin) of list --explain."""
    rows = [re.split(r"  +", line.strip(), maxsplit=2) for line in text.splitlines()]
    return {row[0]: (row[1], row[-1]) for row in rows if len(row) >= 2}


def test_explain_gives_each_values_file(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("k_sample: 4\n")
    found = call(
        "list",
        "--explain",
        "--dataset=amazon-beauty",
        "--preset=wo_c_aug",
        "--tau=0.2",
        "--config_files",
        str(path),
    )
    assert found.code == 0
    rows = explained(found.out)
    assert rows["cl_weight"] == ("0.4", "properties/tuned/amazon-beauty/SimDiffRec.yaml")
    assert rows["hidden_dropout_prob"] == ("0.5", "properties/dataset/amazon-beauty.yaml")
    assert rows["diffusion_steps"] == ("1000", "properties/model/SimDiffRec.yaml")
    assert rows["aug_position"] == ("random", "properties/preset/SimDiffRec/wo_c_aug.yaml")
    assert rows["epochs"] == ("300", "properties/overall.yaml")
    assert rows["learner"] == ("adam", "recbole/properties/overall.yaml")
    assert rows["k_sample"] == ("4", str(path))
    assert rows["tau"] == ("0.2", "command line")
    assert len(rows) > 80


def test_explain_of_recboles_model(call: Any) -> None:
    found = call("list", "--explain", "--model=GRU4Rec", "--dataset=ml-100k")
    rows = explained(found.out)
    assert rows["embedding_size"][1] == "recbole/properties/model/GRU4Rec.yaml"
    assert "k_noise" not in rows


def test_list_refuses_unknown_keys(call: Any) -> None:
    found = call("list", "--explain", "--epoch=3")
    assert found.code == 2
    assert "did you mean epochs?" in found.err


def test_a_stopped_run_is_named_for_resuming(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In short; test_resume.py stops real processes."""
    stock = PlanTrainer._step

    def interrupted(self: Any, *rest: Any) -> Any:
        self._signal = 15
        return stock(self, *rest)

    monkeypatch.setattr(PlanTrainer, "_step", interrupted)
    found = call(*arguments(tmp_path))
    assert found.code == 143
    (last,) = (tmp_path / "saved").glob(f"*/{LAST}")
    assert "stopped by SIGTERM; everything is saved. Continue with\n  python run" in found.err
    assert f"--resume={last.parent}" in found.err
    monkeypatch.undo()
    assert call(f"--resume={last.parent}", f"--data_path={data_path}").code == 0
