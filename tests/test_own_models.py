"""Models of the user's own: the page about them as it is written, the contract, every command.

``pytest tests/test_own_models.py --own_model=mine.py:MyRec`` runs the contract over another one.
"""

import json
import linecache
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

import recbole_simdiff
from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST, LAST
from recbole_simdiff.cli.main import main
from recbole_simdiff.config.config import Config
from recbole_simdiff.data.loaders import BucketLoader
from recbole_simdiff.errors import Interrupted, UserError
from recbole_simdiff.models import own
from recbole_simdiff.models.recbole import RecBoleModel, TwoStageModel
from recbole_simdiff.models.registry import available_models, get_model
from recbole_simdiff.modules.base import SequentialModel
from recbole_simdiff.serving.card import card
from recbole_simdiff.serving.strip import strip
from recbole_simdiff.training.trainer import PlanTrainer
from tests.contract import check_item_table, check_sampling, check_training, check_views

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-model.md").read_text()
SMALL: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 4,
    "train_batch_size": 4,
    "topk": [1, 2, 5],
    "valid_metric": "NDCG@5",
    "use_gpu": False,
    "show_progress": False,
    "epochs": 2,
}
# Derived from a model of RecBole, with a setting of its own.
HOST = """
from recbole.model.sequential_recommender import GRU4Rec, S3Rec

FACTOR = 2

class Louder(GRU4Rec):
    defaults = {"factor": 3.0}

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.factor = config["factor"]

    def full_sort_predict(self, interaction):
        return self.factor * super().full_sort_predict(interaction)

class Pretrained(S3Rec):
    pass

class Other:
    pass
"""


def block(name: str) -> str:
    """A block of the page."""
    (found,) = re.findall(rf"<!-- example: {re.escape(name)} -->\n```\w*\n(.*?)```", PAGE, re.S)
    return str(found)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known of models that other tests named, as in a new process."""
    monkeypatch.setattr(own, "_KNOWN", {})
    monkeypatch.setattr(own, "_FILES", {})
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


def forget() -> None:
    own._KNOWN.clear()
    own._FILES.clear()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The page's model, in the working directory."""
    path = tmp_path / "mine.py"
    path.write_text(block("mine.py"))
    return path


@pytest.fixture
def values(tmp_path: Path, data_path: Path) -> dict[str, Any]:
    return SMALL | {"data_path": str(data_path), "checkpoint_dir": str(tmp_path / "saved")}


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in values.items()]


# ---------------------------------------------------------------- the page


def test_the_page_has_a_short_example() -> None:
    assert len(block("mine.py").splitlines()) <= 40


def test_the_page_works_as_it_is_written(mine: Path, tmp_path: Path) -> None:
    """On ml-100k, which RecBole ships; one epoch in place of five."""
    _, script, *arguments = shlex.split(block("command"))
    script = str(ROOT / script)
    short = ["--epochs=1", "--use_gpu=False", "--show_progress=False"]
    arguments = [a for a in arguments if not a.startswith("--epochs")] + short
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True
    )
    assert "MyRec on ml-100k: best epoch 0" in done.stdout
    (run_dir,) = (tmp_path / "saved").glob("MyRec-ml-100k-*")
    test = json.loads((run_dir / "result.json").read_text())["test"]["history kept"]
    assert test["hit@10"] > 0.05  # 10 of 1,349 items by chance: 0.007


def test_the_lines_of_python_work_as_they_are_written(
    mine: Path, tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On toy data in place of ml-100k."""
    text = block("python").replace('"ml-100k", epochs=5', '"toy", **values')
    text = text.replace('[["50", "181", "172"]]', '[["i1", "i2"]]')
    text = f"values = {SMALL | {'data_path': str(data_path)}!r}\n{text}"
    (tmp_path / "script.py").write_text(text)
    subprocess.run([sys.executable, "script.py"], check=True, env=os.environ | {"PYTHONPATH": "."})
    assert len(list((tmp_path / "saved").glob("MyRec-toy-*"))) == 1


# ---------------------------------------------------------------- the contract


@pytest.fixture(params=["MyRec", "Louder", "--own_model"])
def reference(request: pytest.FixtureRequest, mine: Path) -> str:
    """A model of this package's kind, one of RecBole's kind, and the one that the caller names."""
    if request.param != "--own_model":
        (mine.parent / "host.py").write_text(HOST)
        return f"{mine if request.param == 'MyRec' else mine.parent / 'host.py'}:{request.param}"
    given = request.config.getoption("--own_model")
    if given is None:
        pytest.skip("no --own_model is given")
    file, _, name = given.rpartition(":")
    return f"{Path(request.config.invocation_params.dir) / file}:{name}"


@pytest.fixture
def made(reference: str, build: Any, data_path: Path) -> Any:
    """(training loader, test loader, model)."""
    changed = {k: v for k, v in SMALL.items() if k in Config(reference, "toy").final_config_dict}
    _, train, _, test, model = build(reference, **changed)
    return train, test, model


def test_losses_are_finite_and_move_parameters(made: Any) -> None:
    train, _, model = made
    still = check_training(model, max(train, key=lambda batch: batch["item_length"].max()))
    assert still < {name for name, _ in model.named_parameters()}


def test_its_item_table_is_a_row_an_item(made: Any) -> None:
    check_item_table(made[2], made[0]._dataset.item_num)


def test_it_says_whether_scores_depend_on_a_seed(made: Any) -> None:
    check_sampling(made[2], next(iter(made[1]))[0], made[2].full_sort_predict)


def test_augmented_views_are_rows_of_items(made: Any) -> None:
    check_views(made[2], next(iter(made[0])), made[0]._dataset.item_num)


def test_predict_is_a_column_of_full_sort_predict(made: Any) -> None:
    _, test, model = made
    model.eval()
    batch = next(iter(test))[0]
    scores = model.full_sort_predict(batch).view(len(batch), -1)
    column = scores.gather(1, batch["item_id"].unsqueeze(1)).squeeze(1)
    if "factor" not in vars(model):  # whose predict is RecBole's
        torch.testing.assert_close(model.predict(batch), column)


def test_scores_do_not_depend_on_padding(made: Any) -> None:
    _, test, model = made
    model.eval()
    batch = next(iter(test))[0]
    items = torch.nn.functional.pad(batch["item_id_list"], (0, 3))[:, :4]
    again = Interaction({**batch.interaction, "item_id_list": items})
    torch.testing.assert_close(model.full_sort_predict(again), model.full_sort_predict(batch))


# ---------------------------------------------------------------- settings


def test_defaults_of_the_class_and_of_files_beside_it(mine: Path, data_path: Path) -> None:
    """The later one wins; a data set's settings and given values win over all."""

    def config(**changed: Any) -> Config:
        forget()
        return Config(f"{mine}:MyRec", "toy", (), {"data_path": str(data_path)} | changed)

    assert config()["newest"] == 3
    assert config().origin["newest"] == "MyRec.defaults"
    mine.with_name("mine.yaml").write_text("newest: 4\nhidden_size: 16\n")
    assert (config()["newest"], config()["hidden_size"]) == (4, 16)
    mine.with_name("MyRec.yaml").write_text("newest: 7\n")
    assert (config()["newest"], config()["hidden_size"]) == (7, 16)
    assert config().origin["newest"] == str(mine.with_name("MyRec.yaml"))
    assert config(newest=2)["newest"] == 2
    with pytest.raises(UserError, match=r"unknown key 'newst'.*did you mean newest"):
        config(newst=2)
    with pytest.raises(UserError, match=r"newest='many'.* must be a whole number"):
        config(newest="many")


def test_a_model_of_recbole_keeps_its_defaults(mine: Path) -> None:
    mine.write_text(HOST)
    config = Config(f"{mine}:Louder", "toy")
    host = Config("GRU4Rec", "toy")
    assert config["factor"] == 3.0
    assert not config.is_plugin
    assert issubclass(config.model_class, RecBoleModel)
    known = {k: v for k, v in config.final_config_dict.items() if k not in ("model", "factor")}
    assert known == {k: v for k, v in host.final_config_dict.items() if k != "model"}
    assert issubclass(get_model(f"{mine}:Pretrained"), TwoStageModel)


def test_a_model_that_wants_negatives_gets_them(mine: Path, build: Any) -> None:
    text = mine.read_text().replace(
        "    defaults", "    input_type = InputType.PAIRWISE\n    defaults", 1
    )
    mine.write_text("from recbole.utils import InputType\n" + text)
    config, train, *_ = build(f"{mine}:MyRec")
    assert not isinstance(train, BucketLoader)
    assert config["train_neg_sample_args"]["sample_num"] == 1
    assert (next(iter(train))["neg_item_id"] > 0).all()


# ---------------------------------------------------------------- every command


def test_from_the_command_line(
    mine: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model=mine.py:MyRec", "--dataset=toy", *options(values)]) == 0
    (run_dir,) = (tmp_path / "saved").glob("MyRec-toy-*")
    printed = capsys.readouterr().out
    forget()
    for command in ("evaluate", "recommend"):
        user = ["--users=a"] if command == "recommend" else []
        given = [command, f"--checkpoint={run_dir}", *user]
        assert main(given) == 2
        assert "runs no code. Name it: --model_file=mine.py" in capsys.readouterr().err
        assert main([*given, "--model_file=mine.py"]) == 0
        if command == "evaluate":
            assert capsys.readouterr().out.splitlines()[2:7] == printed.splitlines()[2:7]
        forget()
    assert main(["--model_file=mine.py"]) == 2
    assert "--model=mine.py:CLASS" in capsys.readouterr().err
    assert main(["list", "--explain", "--model=mine.py:MyRec"]) == 0
    assert re.search(r"newest +3 +MyRec.defaults", capsys.readouterr().out)
    content = checkpoint.load(run_dir / BEST)[1]
    assert content["own_model"]["file"] == "mine.py"
    assert content["config"]["model"] == "MyRec"
    assert str(tmp_path) not in json.dumps(content["own_model"])


def test_a_stopped_run_is_resumed(
    mine: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recbole_simdiff.run(f"{mine}:MyRec", "toy", **values)
    stock, runs = PlanTrainer.save_state, []

    def stop(self: PlanTrainer, name: str) -> None:
        stock(self, name)
        if name == LAST and self.progress.epoch == 1 and not runs:
            runs.append(self.run_dir)
            raise Interrupted(2, self.run_dir)

    monkeypatch.setattr(PlanTrainer, "save_state", stop)
    with pytest.raises(Interrupted):
        recbole_simdiff.run(f"{mine}:MyRec", "toy", **values)
    forget()
    with pytest.raises(UserError, match=r"Name it: --model_file=mine.py"):
        recbole_simdiff.resume(runs[0])
    mine.write_text(mine.read_text().replace("std=0.05", "std=0.1") + "# another\n")
    with pytest.raises(UserError, match=r"is not the code that .* Put that back"):
        recbole_simdiff.resume(runs[0], model=str(mine))
    mine.write_text(block("mine.py") + "# a comment\n")
    again = recbole_simdiff.resume(runs[0], model=str(mine))
    assert again.test == whole.test


def test_other_code_is_warned_of(
    mine: Path, values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are used as they are, if they fit."""
    run_dir = recbole_simdiff.run(f"{mine}:MyRec", "toy", **values).run_dir
    mine.write_text(f'"""Only words."""\n{mine.read_text()}')
    recbole_simdiff.evaluate(run_dir, model=mine)
    assert "is not the code" not in caplog.text
    mine.write_text(mine.read_text().replace("@ self.item", "@ -self.item"))
    recbole_simdiff.load(run_dir, model=str(mine))
    assert "its code in mine.py" in caplog.text
    assert "is not the code that the checkpoint was trained with" in caplog.text
    mine.write_text(mine.read_text().replace("self.item_embedding", "self.table"))
    with pytest.raises(UserError, match="does not fit the model"):
        recbole_simdiff.load(run_dir, model=str(mine))


def test_parts_of_other_code_are_not_mixed_in(
    mine: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = recbole_simdiff.run(f"{mine}:MyRec", "toy", **values).run_dir
    given = [f"--checkpoint={run_dir}", "--model_file=mine.py", "--all_users", "--format=json"]
    assert main(["recommend", *given, "--output=out"]) == 0
    mine.write_text(mine.read_text().replace("@ self.item", "@ -self.item"))
    forget()
    assert main(["recommend", *given, "--output=out"]) == 2
    assert "out holds parts with code of the model=" in capsys.readouterr().err


def test_a_checkpoint_without_users_names_its_class(
    mine: Path, values: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = recbole_simdiff.run(f"{mine}:MyRec", "toy", **values).run_dir
    path = mine.with_name("model.safetensors")
    strip(run_dir, path)
    forget()
    with pytest.raises(UserError, match=r"Name it: --model_file=mine.py"):
        recbole_simdiff.load(path)
    assert "# MyRec on toy" in card(path)
    mine.write_text(mine.read_text().replace("@ self.item", "@ -self.item"))
    recbole_simdiff.load(path, model=mine)
    assert "is not the code that the checkpoint was trained with" in caplog.text


def test_it_is_the_backbone_of_diffuasr(mine: Path, values: dict[str, Any]) -> None:
    given = values | {"augmenter": "random", "n_pseudo": 2}
    result = recbole_simdiff.run("DiffuASR", "toy", backbone=f"{mine}:MyRec", **given)
    assert result.config["values"]["backbone"] == "MyRec"
    forget()
    with pytest.raises(UserError, match=r"trained with model=MyRec of mine.py"):
        recbole_simdiff.evaluate(result.run_dir)
    assert recbole_simdiff.evaluate(result.run_dir, model=str(mine)).test == result.test


def test_benchmark_and_figures(
    mine: Path, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is a process of its own, which finds the model by its file."""
    given = ["--datasets=toy", "--seeds=1", *options(values | {"epochs": 1})]
    assert main(["benchmark", "--models=mine.py:MyRec,SASRec", *given]) == 0
    assert "| MyRec |" in capsys.readouterr().out
    (run_dir,) = (tmp_path / "saved").glob("MyRec-toy-*")
    forget()
    plot = ["plot", f"--runs={run_dir}", "--figures=embeddings"]
    assert main(plot) == 2
    assert "Name it: --model_file=mine.py" in capsys.readouterr().err
    assert main([*plot, "--model_file=mine.py"]) == 0
    assert "-embeddings" in capsys.readouterr().out


def test_a_search(mine: Path, values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.hyper").write_text("newest choice [1,2]\n")
    given = values | {"epochs": 1}
    found = recbole_simdiff.tune(
        f"{mine}:MyRec", "toy", "mine.hyper", algo="exhaustive", jobs=2, **given
    )
    assert found.values["newest"] in (1, 2)
    assert list(found.trials["state"]) == ["done", "done"]
    assert found.result.tested


def test_a_changed_model_has_another_fingerprint(mine: Path, make_config: Any) -> None:
    from recbole_simdiff.runs.identity import fingerprint

    first = fingerprint(make_config(f"{mine}:MyRec"), "")
    mine.write_text(mine.read_text() + "\n# nothing\n")
    assert fingerprint(make_config(f"{mine}:MyRec"), "") == first
    mine.write_text(mine.read_text().replace("std=0.05", "std=0.1"))
    assert fingerprint(make_config(f"{mine}:MyRec"), "") != first


# ---------------------------------------------------------------- classes without a file


def typed(text: str, name: str = "MyRec") -> type:
    """A class as a notebook has it: of ``__main__``, and of no file."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, "<cell 1>", "exec"), space)
    found: type = space[name]
    return found


def test_a_class_that_was_typed(values: dict[str, Any], tmp_path: Path) -> None:
    model = typed(block("mine.py"))
    result = recbole_simdiff.run(model, "toy", newest=np.int64(2), **values)
    assert result.config["values"]["newest"] == 2
    # It is known in this process, and must be given in another.
    assert recbole_simdiff.evaluate(result.run_dir).test == result.test
    forget()
    with pytest.raises(UserError, match=r"Name it: model=MyRec \(the class\) in Python"):
        recbole_simdiff.load(result.run_dir)
    trained = recbole_simdiff.load(result.run_dir, model=model)
    assert len(trained.recommend([["i1", "i2"]], k=3)[0].items) == 3
    (tmp_path / "mine.hyper").write_text("newest choice [1,2]\n")
    small = values | {"epochs": 1}
    found = recbole_simdiff.tune(model, "toy", "mine.hyper", algo="exhaustive", **small)
    assert len(found.trials) == 2
    for refused in (
        lambda: recbole_simdiff.benchmark([model], "toy", **small),
        lambda: recbole_simdiff.tune(model, "toy", "mine.hyper", jobs=2, **small),
    ):
        with pytest.raises(UserError, match="other processes do not find it; write it to a file"):
            refused()


def test_the_code_of_a_cell_is_compared(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A notebook keeps the text of its cells where tracebacks find it."""

    def cell(text: str) -> type:
        lines = text.splitlines(keepends=True)
        monkeypatch.setitem(linecache.cache, "<cell 1>", (len(text), None, lines, "<cell 1>"))
        forget()
        return typed(text)

    run_dir = recbole_simdiff.run(cell(block("mine.py")), "toy", **values).run_dir
    recbole_simdiff.load(run_dir, model=cell(block("mine.py") + "\nprint('trained', MyRec)\n"))
    assert "is not the code" not in caplog.text
    recbole_simdiff.load(run_dir, model=cell(block("mine.py").replace("clamp(min=0)", "clamp(0)")))
    assert "its code in a notebook or a prompt" in caplog.text


def test_known_classes_are_models_by_their_name() -> None:
    from recbole.model.sequential_recommender import SASRec

    assert get_model(SASRec) is get_model("SASRec")
    assert get_model(get_model("SASRecCE")) is get_model("SASRecCE")
    assert Config(SASRec, "toy").name == "SASRec"
    assert own.of(get_model(SASRec)) is None


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (None, "mine.py:MyRec", r"mine.py cannot be read: No such file"),
        (HOST, "mine.py:Louda", r"has no class 'Louda'; it has Louder, Pretrained"),
        (HOST, "mine.py", r"must name a class of the file: mine.py:Louder, mine.py:Pretrained"),
        (HOST, "mine.py:Other", r"model=Other \(.*mine.py\) is not a sequential recommender"),
        ("", "mine.py:MyRec", "it has no class that is a sequential recommender"),
        ("x = 1\nimport absent_1\n", "mine.py:A", "line 2: ModuleNotFoundError: No module named"),
        ("x = 1\n\ny = 1 / 0\n", "mine.py:A", "line 3: ZeroDivisionError: division by zero"),
        ("x = (\n", "mine.py:A", r"line 1: SyntaxError: '\(' was never closed"),
        ("import sys\nsys.exit(3)\n", "mine.py:A", "line 2: SystemExit: 3"),
        (HOST.replace("Louder", "SASRec"), "mine.py:SASRec", "has a model of that name"),
        (HOST.replace('{"factor": 3.0}', "[3.0]"), "mine.py:Louder", "must be a dictionary"),
    ],
)
def test_mistakes(
    text: str | None,
    given: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    assert main([f"--model={given}", "--dataset=ml-100k"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_file_may_import_others_beside_it(mine: Path) -> None:
    mine.with_name("width_of_mine.py").write_text("WIDTH = 24\n")
    mine.write_text("from width_of_mine import WIDTH\n" + mine.read_text().replace("64", "WIDTH"))
    assert Config(f"{mine}:MyRec", "toy")["hidden_size"] == 24


def test_opening_a_checkpoint_runs_no_code(mine: Path, values: dict[str, Any]) -> None:
    """Not even one whose model, or backbone, was forged to name a file."""
    run_dir = recbole_simdiff.run("SASRec", "toy", **values).run_dir
    evil = mine.with_name("evil.py")
    evil.write_text("from pathlib import Path\nPath('ran').touch()\n")
    tensors, content = checkpoint.load(Path(run_dir) / BEST)
    stored = content["config"]
    for model, changed in (
        (f"{evil}:A", {}),
        ("DiffuASR", {"backbone": f"{evil}:A"}),
    ):
        content["config"] = stored | {"model": model, "values": stored["values"] | changed}
        data = {"data.pseudo": torch.zeros(len(content["users"]), 1, dtype=torch.int)}
        checkpoint.save(mine.with_name("forged.safetensors"), tensors | data, content)
        for opening in (recbole_simdiff.load, recbole_simdiff.evaluate):
            with pytest.raises(UserError, match="comes from a checkpoint, which runs no code"):
                opening(mine.with_name("forged.safetensors"))
    assert not Path("ran").exists()


# ---------------------------------------------------------------- installed packages


def test_entry_points(mine: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    points = [
        EntryPoint("MyRec", "mine:MyRec", own.GROUP),
        EntryPoint("Renamed", "mine:MyRec", own.GROUP),
        EntryPoint("Absent", "absent_1:A", own.GROUP),
    ]
    monkeypatch.setattr(own, "entry_points", lambda group: points if group == own.GROUP else [])
    assert "mine" not in sys.modules
    assert {"MyRec", "Renamed", "Absent"} <= set(available_models())
    assert "mine" not in sys.modules
    assert issubclass(get_model("MyRec"), SequentialModel)
    run_dir = recbole_simdiff.run("MyRec", "toy", **values).run_dir
    forget()
    recbole_simdiff.load(run_dir)  # who installed it agreed to run it
    assert checkpoint.load(Path(run_dir) / BEST)[1]["own_model"]["file"] == "mine:MyRec"
    with pytest.raises(UserError, match="must have the name of its class, MyRec"):
        get_model("Renamed")
    with pytest.raises(UserError, match=r"Absent .* absent_1:A cannot be imported: ModuleNotF"):
        get_model("Absent")
    with pytest.raises(UserError, match="Did you mean MyRec"):
        get_model("MyRecs")
