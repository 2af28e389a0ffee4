"""The command line: exit codes, what is printed where, and messages a stranger can act on."""

import csv
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

import recbole_simdiff
from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli import settings
from recbole_simdiff.cli.main import main
from recbole_simdiff.cli.messages import printable, program
from recbole_simdiff.cli.results import print_result
from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import TrainingDiverged
from recbole_simdiff.models.diffuasr.generator import DiffuASR
from recbole_simdiff.runs.result import RESULT, RunResult, read_result
from recbole_simdiff.training.trainer import PlanTrainer
from tests.conftest import SEQUENCES, SMALL, write_inter


def arguments(folder: Path, model: str = "SimDiffRec", **changes: Any) -> list[str]:
    """Those of the small settings that the model knows as a command line for toy in ``folder``."""
    known = Config(model, "toy").final_config_dict
    values = {key: value for key, value in SMALL.items() if key in known}
    values |= {
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
            [
                "train",
                "evaluate",
                "recommend",
                "augment",
                "list",
                "--resume=saved/<run>",
                "examples",
            ],
        ),
        (
            ["train", "--help"],
            ["--model", "--dataset", "--config_files", "--resume", "--key=value"],
        ),
        (["evaluate", "--help"], ["--checkpoint", "run folder", "save_rankings"]),
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
        (["augment", "--help"], ["--output", "--dataset", "--config_files", "--key=value"]),
        (
            ["tune", "--help"],
            ["--space", "--engine", "--algo", "--trials", "--jobs", "--storage", "--no_pruning"],
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
    assert ", last 1," in found.out
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
        (
            ["--epochs=0"],
            "epochs=0 must be at least 1, at most 2,147,483,647 (epochs from command line)",
        ),
        (["--learning_rate=fast"], "learning_rate='fast' (command line) must be a number"),
        (["--enable_amp=2"], "enable_amp=2 (command line) must be true or false"),
        (["--tau=0"], "tau=0.0 must be positive"),
        (["--sr_loss=BPR"], "sr_loss='BPR' is not one of CE, BCE"),
        (["--preset=none"], "preset='none' (command line) is not one of paper, official"),
        (["--valid_metric=NDCG@7"], "valid_metric=NDCG@7 (command line) must be one of metrics="),
        (["--model=SimDifRec"], "Did you mean SimDiffRec"),
        (["--model=BPR"], "model='BPR' is not a sequential model of recbole_simdiff or RecBole."),
        (["--dataset=toy2"], "dataset='toy2' is not there:"),
        (["--dataset=../../x"], "dataset='../../x' must be a name without / and \\ that"),
        (["--config_file=x.yaml"], "'config_file' (command line) for model=SimDiffRec; YAML files"),
        (["--config_file_list=x.yaml"], "YAML files are given by config_files"),
        (["--POSITION_FIELD=x"], "POSITION_FIELD='x' (command line) has no effect"),
        (["--hidden_size=1000000"], "GiB or more for its weights; this machine has"),
        (["--ITEM_LIST_LENGTH_FIELD=item_id"], "'item_id' would be written over"),
        (["--topk=[&a [*a]]"], "--topk: [&a [*a]] cannot be used: with its aliases expanded it ha"),
        (["--config_files", "gone.yaml"], "cannot read the configuration file gone.yaml"),
        (["epochs=3"], "'epochs=3' is not of the form --key=value"),
        (["--seed="], "--seed= is empty; give a value, or seed=None for none"),
        (["--resume="], "--resume is empty; give a value, or leave it out"),
        (["--config_files", ""], "--config_files is empty"),
        (["--tau=-1"], "tau=-1.0 must be positive (tau from command line)"),
        (["--epochs"], "--epochs needs a value: --epochs=value"),
        (["--seed=1", "--seed=2"], "--seed is given twice: 1 and 2"),
        (["--model=SASRec", "-m", "DuoRec"], "-m is given twice: 'SASRec' and 'DuoRec'"),
        (["--nproc=1", "--nproc=2"], "--nproc is given twice: 1 and 2"),
        (["--k_noise=12"], "k_noise=12 must be smaller than the number of items"),
        (["--k_noise=12"], "11 neighbours for each (k_noise from command line)"),
        (["--topk=[1,5,20]"], "topk=[1, 5, 20] exceeds the 12 items there are (topk from command"),
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


@pytest.mark.parametrize("key", ["model", "dataset"])
@pytest.mark.parametrize("command", [[], ["list", "--explain"], ["tune"]])
def test_an_empty_name_does_not_mean_the_default(
    call: Any, monkeypatch: pytest.MonkeyPatch, command: list[str], key: str
) -> None:
    """As of a shell variable that is not set."""
    monkeypatch.setattr(
        settings, "Config", None
    )  # else a failure of this test would be a long training
    found = call(*command, f"--{key}=")
    assert found.code == 2
    assert f"error: --{key} is empty; give a value, or leave it out" in found.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("evalute", "'evalute' is neither a command nor of the form --key=value; did you mean ev"),
        ("run", "'run' is neither a command nor of the form --key=value; commands are train, eval"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(
    call: Any, given: str, message: str
) -> None:
    found = call(given, "--checkpoint=run")
    assert found.code == 2
    assert f"error: {message}" in found.err


def test_config_files_given_one_by_one_are_all_read(call: Any, tmp_path: Path) -> None:
    for name, text in (("a", "tau: 0.5\nk_noise: 2\n"), ("b", "tau: 0.6\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [f"--config_files={tmp_path / name}.yaml" for name in ("a", "b")]
    rows = explained(call("list", "--explain", *files).out)
    assert rows["k_noise"] == ("2", f"{tmp_path}/a.yaml")
    assert rows["tau"] == ("0.6", f"{tmp_path}/b.yaml")


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
    found = call("evaluate", f"--checkpoint={run_dir}", "--valid_metric=NDCG@7")
    assert "valid_metric=NDCG@7 (command line) must be" in found.err
    assert "(metrics from checkpoint, topk from checkpoint)" in found.err
    found = call("evaluate", f"--checkpoint={run_dir}", "--hidden_size=3")
    assert found.code == 2
    assert "hidden_size cannot be changed here: the checkpoint fixes it." in found.err


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
    found = recommend("--users=a, e", "--k=3", "--format=json")
    assert found.code == 0
    rows = [json.loads(line) for line in found.out.splitlines()]
    assert [row["history"] for row in rows] == ["a", "e"]
    assert set(rows[0]["items"]) == {"i10", "i11", "i12"}  # a has seen all others
    assert len(rows[1]["items"]) == len(rows[1]["scores"]) == 3
    assert not set(rows[1]["items"]) & set(SEQUENCES["e"])


def test_recommend_to_everybody(recommend: Any) -> None:
    found = recommend("--all_users", "--k=3", "--format=json")
    assert found.out == recommend("--users=a,b,c,d,e,f", "--k=3", "--format=json").out
    assert "not allowed with" in recommend("--all_users", "--users=a").err


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


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("source", ["file", "standard input"])
def test_histories_are_read_line_by_line(
    recommend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, mark: str
) -> None:
    """CSV, JSON lists and JSON objects, with or without a name."""
    (tmp_path / "histories").write_text(mark + LINES)
    monkeypatch.setattr("sys.stdin", io.StringIO(mark + LINES))
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
        ('{"user": "u"}', 'line 2: expected item ids as [...] or {"items"'),
        ('{"items": "i1"}', 'line 2: expected item ids as [...] or {"items"'),
        ('{"items": [["i1"]]}', 'line 2: expected item ids as [...] or {"items"'),
        ("[" * 100_000 + "]" * 100_000, "line 2: nested too deep"),
        (f"[{'1' * 10_000}]", "line 2: a number of more than 4300 digits; write ids as text"),
        ("x" * 200_000, "line 2: field larger than field limit (131072)"),
    ],
)
def test_a_malformed_line_is_named(recommend: Any, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "histories"
    path.write_text(f"i1\n{line}\n")
    found = recommend(f"--input={path}")
    assert found.code == 2
    assert found.out == ""
    assert f"error: {path}, {message}" in found.err


def test_control_characters_are_shown_as_escapes(recommend: Any, tmp_path: Path) -> None:
    """They would steer the terminal, or forge lines; JSON and CSV are for programs."""
    name = "\x1b[2J\nu\u202e\ud800\x9b"
    path = tmp_path / "histories"
    path.write_text(json.dumps({"user": name, "items": ["i1", "\x1b]0;x\x07"]}))
    found = recommend(f"--input={path}", "--k=1")
    shown = r"\x1b[2J\nu\u202e\ud800\x9b"
    assert found.out.splitlines()[0] == shown
    assert rf"{shown}: 1 unknown items left out: \x1b]0;x\x07" in found.err
    assert "\x1b" not in found.out + found.err
    assert json.loads(recommend(f"--input={path}", "--format=json").out)["history"] == name
    assert printable("Amélie 👩\u200d🚀 \xa0") == "Amélie 👩\u200d🚀 \xa0"


def test_ids_in_csv_are_those_of_the_data(call: Any, tmp_path: Path) -> None:
    """Also one that a spreadsheet would run: changed, it would be no id of the data set."""
    formula = "=cmd|' /C calc'!A1"
    users = {u: [formula if i == "i1" else i for i in items] for u, items in SEQUENCES.items()}
    write_inter(tmp_path / "dataset", "toy", users)
    assert call("--model=SASRec", *arguments(tmp_path, "SASRec", save_rankings=True)).code == 0
    (place,) = (tmp_path / "saved").iterdir()
    command = ("recommend", f"--checkpoint={place}", "--history=i2", "--format=csv", "--k=12")
    items = {row["item"] for row in csv.DictReader(io.StringIO(call(*command).out))}
    assert formula in items
    with open(place / "ranks.csv", newline="") as file:
        assert formula in {row["item"] for row in csv.DictReader(file)}


def test_unknown_items_are_reported_on_standard_error(recommend: Any) -> None:
    found = recommend("--history=i1,zz,i2,yy", "--history=zz", "--format=csv", "--k=1")
    assert found.code == 0
    assert len(found.out.splitlines()) == 2
    assert "history 1: 2 unknown items left out: zz, yy" in found.err
    assert (
        "history 2: no known item, no recommendation: zz (items are separated by commas: i1,i2,i3)"
        in found.err
    )


@pytest.mark.parametrize("format", ["table", "json", "csv"])
@pytest.mark.parametrize("text", ["i1 i2 i3", "i1;i2", "zz,yy", "[]", "i1\ti2"])
def test_histories_without_any_known_item_are_a_mistake(
    recommend: Any, tmp_path: Path, text: str, format: str
) -> None:
    """Most likely they are separated in another way."""
    path = tmp_path / "histories"
    path.write_text(f"{text}\n{text}\n")
    found = recommend(f"--input={path}", f"--format={format}")
    assert found.code == 2
    assert found.out == ""
    assert found.err.count("(items are separated by commas: i1,i2,i3)") == 2
    assert "line 2: no known item, no recommendation: " in found.err
    assert "error: no history has an item of the training data" in found.err


def test_a_history_of_all_items_is_not_unknown(recommend: Any) -> None:
    everything = ",".join(f"i{n}" for n in range(1, 13))
    found = recommend(f"--history={everything}")
    assert found.code == 0
    assert "history 1: all items have been seen; --seen=keep" in found.err
    assert "known item" not in found.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to recommend to: give --users, --all_users, --history or --input"),
        (["--input=/dev/null"], "nothing to recommend to: /dev/null has no history"),
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
    assert not {"DIEN", "GRU4RecKG", "KSR"} & set(lines["RecBole's models"].strip().split(", "))
    assert "amazon-beauty" in lines["data sets with settings here"]
    assert "official" in lines["presets of SimDiffRec"]
    assert lines["presets of CL4SRec"] == " paper"
    assert lines["presets of DiffCLRec"] == lines["presets of CaDiRec"]
    assert lines["presets of CaDiRec"] == " paper, cl_trains_items, official, separate_items"


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


@pytest.mark.parametrize("given", ["--cl_wieght=3", "--model=SASRec", "--config_files=a.yaml"])
def test_list_alone_reads_no_keys(call: Any, given: str) -> None:
    found = call("list", given)
    assert (found.code, found.out) == (2, "")
    key = given.partition("=")[0]
    assert f"error: {key} needs --explain" in found.err


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
        self.stop.signum = 15
        return stock(self, *rest)

    monkeypatch.setattr(PlanTrainer, "_step", interrupted)
    found = call(*arguments(tmp_path))
    assert found.code == 143
    (last,) = (tmp_path / "saved").glob(f"*/{LAST}")
    assert "stopped by SIGTERM; everything is saved. Continue with\n  python run" in found.err
    assert f"--resume={last.parent}" in found.err
    monkeypatch.undo()
    assert call(f"--resume={last.parent}", f"--data_path={data_path}").code == 0


# ---------------------------------------------------------------------- augmented data


def augmented(folder: Path, **changes: Any) -> list[str]:
    """A command line of DiffuASR with a tiny GRU4Rec and random items."""
    values = {"backbone": "GRU4Rec", "augmenter": "random", "n_pseudo": 2, "embedding_size": 16}
    values |= {"length_groups": [3], "augmentation_cache": folder / "cache"} | changes
    return arguments(folder, "GRU4Rec", **values)


GENERATOR = {
    "augmenter": "diffuasr",
    "n_pseudo": 1,
    "diffuasr_diffusion_steps": 25,
    "diffuasr_sample_steps": 2,
    "diffuasr_epochs": 2,
    "sunet_channel_mult": [1, 2],
}


@pytest.mark.parametrize("changes", [{}, GENERATOR], ids=["random", "diffuasr"])
def test_a_run_on_augmented_data_is_compared_with_one_without(
    call: Any, tmp_path: Path, data_path: Path, changes: dict[str, Any]
) -> None:
    found = call("--model=DiffuASR", *augmented(tmp_path, **changes))
    assert found.code == 0
    (place,) = (tmp_path / "saved").iterdir()
    assert place.name.startswith("DiffuASR-toy-")
    assert "DiffuASR on toy: best epoch 0, last 0," in found.out
    assert "test of GRU4Rec by input length, without and with augmentation" in found.out
    rows = [line.split() for line in found.out.splitlines()]
    result = json.loads((place / RESULT).read_text())
    baseline = result["augmentation"]["baseline"]["test"]["history kept"]
    assert ["all", "without", *(f"{v:.4f}" for v in baseline.values())] in rows
    assert ["all", "with", *(f"{v:.4f}" for v in result["test"]["history kept"].values())] in rows
    assert [
        "pseudo-items",
        "similarity",
        "popularity",
        "never",
        "generated",
        "own",
        "item",
    ] in rows
    for line in ("baseline: GRU4Rec on the raw data", "final: GRU4Rec on augmented data"):
        assert line in found.err
    again = call("evaluate", f"--checkpoint={place}")
    assert again.code == 0
    tables = [text[text.index("split ") :] for text in (found.out, again.out)]
    assert tables[0] == f"{tables[1]}checkpoints and result.json: {place}\n"
    found = call("recommend", f"--checkpoint={place}", "--history=i1,i2", "--k=3")
    assert found.code == 0
    assert len(found.out.splitlines()) == 4


def test_augmented_runs_can_be_measured_at_other_cutoffs(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    """The stored numbers of the baseline are of other metrics then."""
    assert call("--model=DiffuASR", *augmented(tmp_path)).code == 0
    (place,) = (tmp_path / "saved").iterdir()
    for change in ("--topk=[5]", "--topk=[3,4,5]", "--length_groups=[4]"):
        found = call("evaluate", f"--checkpoint={place}", change)
        assert found.code == 0, change
        assert "similarity" in found.out
    found = call("evaluate", f"--checkpoint={place}", "--topk=[3,4,5]")
    assert "hit@3" in found.out
    assert "hit@1" not in found.out  # of the baseline, in a table that is headed hit@3


def test_augmented_data_without_a_test_part(call: Any, tmp_path: Path, data_path: Path) -> None:
    split = "{split: {LS: valid_only}, order: TO, group_by: user, mode: full}"
    found = call("--model=DiffuASR", *augmented(tmp_path, eval_args=split))
    assert found.code == 0
    assert "similarity" in found.out


def test_augmented_data_with_sampled_rankings(call: Any, tmp_path: Path, data_path: Path) -> None:
    """One protocol, and no groups."""
    split = "{split: {LS: valid_and_test}, order: TO, group_by: user, mode: uni2}"
    found = call("--model=DiffuASR", *augmented(tmp_path, eval_args=split))
    assert found.code == 0
    assert "history removed" not in found.out
    assert [line.split()[:2] for line in found.out.splitlines() if line.startswith("all")] == [
        ["all", "without"],
        ["all", "with"],
    ]


def test_users_cannot_be_shown_what_needs_invented_items(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    """The run itself succeeded."""
    found = call("--model=DiffuASR", *augmented(tmp_path, pseudo_at_evaluation=True, show_users=1))
    assert found.code == 0
    assert "was trained with pseudo_at_evaluation=True" in found.err
    assert "recommended next" not in found.out


@pytest.mark.parametrize(
    ("owner", "name", "signum"),
    [(PlanTrainer, "_step", signal.SIGTERM), (DiffuASR, "loss", signal.SIGINT)],
    ids=["baseline", "generator"],
)
def test_a_stopped_stage_is_continued_by_the_same_command(
    call: Any,
    tmp_path: Path,
    data_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    signum: int,
) -> None:
    command = ["--model=DiffuASR", *augmented(tmp_path, **GENERATOR)]
    stock = getattr(owner, name)

    def stopped(*given: Any) -> Any:
        os.kill(os.getpid(), signum)
        return stock(*given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        found = call(*command)
    assert found.code == 128 + signum
    wanted = (
        f"stopped by {signal.Signals(signum).name}; everything is saved. Continue with\n  the s"
    )
    assert f"{wanted}ame command\n" in found.err
    assert saved(tmp_path) == []
    found = call(*command)
    assert found.code == 0
    assert "with augmentation" in found.out


def test_a_stopped_last_stage_is_named_for_resuming(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("augment", *augmented(tmp_path), f"--output={tmp_path / 'a.inter'}").code == 0
    stock = PlanTrainer._step

    def stopped(self: Any, *rest: Any) -> Any:
        self.stop.signum = 15
        return stock(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(PlanTrainer, "_step", stopped)
        found = call("--model=DiffuASR", *augmented(tmp_path))
    assert found.code == 143
    (place,) = (tmp_path / "saved").iterdir()
    assert f"  python run_recbole_simdiff.py --resume={place}\n" in found.err
    found = call(f"--resume={place}")
    assert found.code == 0
    assert "without and with augmentation" in found.out
    found = call(f"--resume={place}", "--n_pseudo=3")
    assert found.code == 2
    assert "n_pseudo cannot be changed here" in found.err


def test_augment_writes_a_file_that_other_programs_can_train_on(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    path = tmp_path / "dataset" / "longer" / "longer.inter"
    found = call("augment", *augmented(tmp_path), f"--output={path}")
    assert found.code == 0
    assert found.out.splitlines()[-1] == str(path)
    header, *lines = path.read_text().splitlines()
    assert header == "user_id:token\titem_id:token\ttimestamp:float"
    assert [line.split("\t")[0] for line in lines].count("a") == 9 + 2
    assert not saved(tmp_path)
    plain = [a for a in arguments(tmp_path) if not a.startswith("--dataset")]
    assert call("--dataset=longer", *plain).code == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output=here.csv"], "--output=here.csv must end in .inter, RecBole's atomic file"),
        (["--output=a.inter", "--model=SASRec"], "model='SASRec'"),
        (["--output=a.inter", "--n_psuedo=3"], "did you mean n_pseudo?"),
        ([], "--output"),
    ],
)
def test_mistakes_of_augment(
    call: Any, tmp_path: Path, data_path: Path, given: list[str], message: str
) -> None:
    found = call("augment", *augmented(tmp_path), *given)
    assert found.code == 2
    assert message in found.err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_pseudo": 0}, "n_pseudo=0 must be at least 1"),
        ({"augmenter": "random_sequence"}, "augmenter='random_sequence' is not one of diffuasr, r"),
        (GENERATOR | {"n_pseudo": 9}, "n_pseudo=9: 0 users have the 12 training items it takes"),
        (GENERATOR | {"embedding_size": 17}, "item embeddings of width 17"),
        ({"backbone": "GRU5Rec"}, "model='GRU5Rec' is not a sequential model"),
        ({"backbone": "DiffuASR"}, "backbone=DiffuASR must be a recommender"),
        ({"baseline_checkpoint": "gone"}, "no checkpoint at gone"),
        ({"length_groups": "5"}, "length_groups=5 must be increasing whole numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_in_augmentation_costs_one_line(
    call: Any, tmp_path: Path, data_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = call("--model=DiffuASR", *augmented(tmp_path, **changes))
    assert found.code == 2
    (line,) = [text for text in found.err.splitlines() if text.startswith("error: ")]
    assert message in line
    assert saved(tmp_path) == []


def test_diffuasr_is_listed(call: Any) -> None:
    lines = call("list").out.splitlines()
    assert any("--model=DiffuASR --backbone=NAME" in line for line in lines)
    assert "presets of DiffuASR: paper, official" in lines
    rows = explained(
        call("list", "--explain", "--model=DiffuASR", "--backbone=GRU4Rec", "--dataset=toy").out
    )
    assert rows["diffuasr_sample_steps"] == ("50", "properties/model/DiffuASR.yaml")
    assert rows["num_layers"][1] == "recbole/properties/model/GRU4Rec.yaml"


def test_the_spread_over_sampling_seeds_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"hit@5": {"mean": 0.25, "std": 0.0125}, "ndcg@5": {"mean": 0.125, "std": 0.5}}
    test = {"history kept": {"hit@5": 0.5, "ndcg@5": 0.25}}
    config = {"model": "DreamRec", "dataset": "toy", "values": {"metric_decimal_place": 4}}
    result = RunResult(
        {}, test, 0, 1, 1.0, 1.0, {}, config, {}, "here", sampling={"seeds": [3, 4, 5], **values}
    )
    print_result(result)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("test, history kept, over sampling seeds 3..5")
    assert [line.split()[-3:] for line in lines[start + 1 : start + 4]] == [
        ["protocol", "hit@5", "ndcg@5"],
        ["mean", "0.2500", "0.1250"],
        ["std", "0.0125", "0.5000"],
    ]


def test_without_validation_the_last_epoch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model": "SASRec", "dataset": "toy", "values": {"metric_decimal_place": 4}}
    test = {"history kept": {"hit@5": 0.5}}
    print_result(RunResult({}, test, None, 3, 1.0, 1.0, {}, config, {}, "here"))
    assert "SASRec on toy: no validation data, the last of 3 epochs," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("called", "shown"),
    [
        ("/usr/bin/recbole-simdiff", "recbole-simdiff"),
        ("/code/run_recbole_simdiff.py", "python /code/run_recbole_simdiff.py"),
        ("-c", "python run_recbole_simdiff.py"),
    ],
)
def test_how_to_continue_is_said_in_the_words_of_the_call(
    monkeypatch: pytest.MonkeyPatch, called: str, shown: str
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert program() == shown


def test_memory_that_runs_out_is_no_mistake_of_the_user(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PlanTrainer, "_step", fail)
    found = call(*arguments(tmp_path))
    assert found.code == 1
    assert "error: out of memory: 2.00 GiB requested, " in found.err
    (last,) = (tmp_path / "saved").glob(f"*/{LAST}")
    assert f"{last} holds the last good state" in found.err


def test_a_full_disk_names_the_file_and_how_to_go_on(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, calls = checkpoint.save_file, []

    def full(*given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) > 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        stock(*given, **named)

    monkeypatch.setattr(checkpoint, "save_file", full)
    found = call(*arguments(tmp_path, epochs=3))
    (last,) = (tmp_path / "saved").glob(f"*/{LAST}")
    assert found.code == 2
    assert f"error: {last}: No space left on device; free disk space there. Continue" in found.err
    assert f"--resume={last.parent}" in found.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert call(f"--resume={last.parent}").code == 0


def test_an_output_that_takes_nothing(
    recommend: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", open("/dev/full", "w"))  # noqa: SIM115
    found = recommend("--users=a")
    assert found.code == 2
    assert "error: standard output: No space left on device; free disk space there" in found.err


@pytest.mark.parametrize("place", ["a file", "full"])
def test_a_place_for_tensorboard_is_needed(
    call: Any,
    tmp_path: Path,
    data_path: Path,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Before anything is made; an evaluation writes nothing there."""
    if place == "a file":
        Path("log_tensorboard").touch()
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    found = call(*arguments(tmp_path))
    assert (found.code, found.out) == (2, "")
    why = "cannot be written" if place == "a file" else "has no room left"
    assert f"error: {tmp_path / 'log_tensorboard'} {why}, and TensorBoard files go" in found.err
    assert not (tmp_path / "saved").exists()
    assert call("evaluate", f"--checkpoint={run_dir}").code == 0


def test_tensorboard_loses_no_training(
    call: Any, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    found = call(*arguments(tmp_path, epochs=2))
    assert found.code == 0
    assert found.err.count("TensorBoard: No space left on device; no more is written there") == 1


def test_a_checkpoint_that_may_not_be_read(
    call: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "open", refuse, raising=False)
    found = call("recommend", f"--checkpoint={run_dir}", "--users=a")
    assert found.code == 2
    assert "best.safetensors cannot be read (Permission denied)" in found.err


def started(given: list[str], streams: str) -> tuple[int, str, str]:
    """Exit code and output of the program, started by a shell with these redirections."""
    script = shlex.join([sys.executable, "-m", "recbole_simdiff", *given])
    environment = os.environ | {"PYTHONPATH": str(Path(recbole_simdiff.__file__).parents[1])}
    found = subprocess.run(
        ["sh", "-c", f"{script} {streams}"], capture_output=True, text=True, env=environment
    )
    assert "Traceback" not in found.stderr
    return found.returncode, found.stdout, found.stderr


def imported(arguments: list[str]) -> set[str]:
    """Modules of a process that ran a command."""
    code = (
        "import sys\nfrom recbole_simdiff.cli.main import main\n"
        f"try:\n    code = main({arguments})\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not code\nprint('imported', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_is_answered_without_torch_and_recbole() -> None:
    assert not imported(["--help"]) & {"torch", "recbole", "numpy", "pandas"}


def test_recommendations_need_no_statistics_and_no_figures(run_dir: Path) -> None:
    found = imported(["recommend", f"--checkpoint={run_dir}", "--users=a", "--use_gpu=false"])
    assert "recbole_simdiff.serving.recommender" in found
    assert not found & {"sklearn", "scipy.stats", "matplotlib", "optuna"}


def test_training_with_closed_streams(tmp_path: Path, data_path: Path) -> None:
    """No file may get the number of a stream: what is printed would go into it."""
    assert started(arguments(tmp_path), "<&- >&- 2>&-") == (0, "", "")
    (place,) = (tmp_path / "saved").iterdir()
    assert read_result(place).test
    assert {path.name for path in place.iterdir()} == {BEST, LAST, RESULT, f"{place.name}.log"}


@pytest.mark.parametrize(
    ("given", "streams", "message"),
    [
        ("--input=-", "<&-", "error: standard input is closed; give --input=FILE\n"),
        ("--users=a", ">&-", "error: standard output is closed, and recommend only prints\n"),
    ],
)
def test_recommendations_with_closed_streams(
    run_dir: Path, given: str, streams: str, message: str
) -> None:
    found = started(["recommend", f"--checkpoint={run_dir}", given], streams)
    assert found == (2, "", message)


def test_a_run_folder_that_cannot_be_made_is_named(
    call: Any, tmp_path: Path, data_path: Path
) -> None:
    (tmp_path / "file").touch()
    found = call(*arguments(tmp_path, checkpoint_dir=tmp_path / "file"))
    assert found.code == 2
    assert f"the run folder {tmp_path / 'file'}/" in found.err
    assert "cannot be written (Not a directory); checkpoint_dir says" in found.err
