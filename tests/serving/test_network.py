"""The scoring network as a file: its scores are recommend's, wherever it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_simdiff import UserError, load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.network import ScoringNetwork, export_network
from recbole_simdiff.serving.recommender import Recommender
from tests.serving.conftest import train

HISTORIES = [
    [["i1"]],
    [["i1", "i2", "i3", "i4"], ["i5"]],
    [["i9", "i9"], ["i3", "i1"], ["i12", "i2"]],
    [["i7", "i8", "i2"], ["i6"], ["i1", "i1", "i1"], ["i2", "i4"], ["i10"]],
]


def inputs(numbers: dict[str, int], histories: list[list[str]]) -> dict[str, Any]:
    """What the network reads, padded to the longest history only."""
    lengths = np.array([len(history) for history in histories])
    seq = np.zeros((len(histories), lengths.max()), dtype=np.int64)
    for row, history in zip(seq, histories, strict=True):
        row[: len(history)] = [numbers[item] for item in history]
    return {"item_seq": seq, "item_seq_len": lengths}


def check(recommender: Recommender, folder: Path, network: Any) -> None:
    """Scores of batches of several sizes and lengths are those of ``recommend``, to 1e-4."""
    content = json.loads((folder / "items.json").read_text())
    assert content == {"items": recommender.item_ids, "max_length": 4}
    numbers = {item: number for number, item in enumerate(content["items"])}
    for histories in HISTORIES:
        scores = network(inputs(numbers, histories))
        answers = recommender.recommend(histories, k=12, exclude_seen=False)
        for row, answer in zip(scores, answers, strict=True):
            assert len(answer.items) == 12
            found = [row[numbers[item]] for item in answer.items]
            np.testing.assert_allclose(found, answer.scores, atol=1e-4)


def onnx(path: Path) -> Any:
    """A function that runs the file with onnxruntime."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return lambda values: session.run(None, values)[0]


def program(path: Path) -> Any:
    """A function that runs the file with torch."""
    module = torch.export.load(path).module()

    def run(values: dict[str, Any]) -> Any:
        with torch.no_grad():
            return module(*map(torch.from_numpy, values.values())).numpy()

    return run


@pytest.mark.parametrize(
    ("model", "kinds"),
    [  # ONNX takes its time; from the program on, nothing depends on the model
        ("SASRecCE", ("onnx", "pt2")),
        ("SASRec", ("onnx", "pt2")),
        ("SimDiffRec", ("pt2",)),
        ("CaDiRec", ("pt2",)),
    ],
)
def test_scores_are_those_of_recommend(tmp_path: Path, model: str, kinds: tuple[str, ...]) -> None:
    if "onnx" in kinds:
        pytest.importorskip("onnxscript", reason="the extra export")
    recommender = load(train(tmp_path, model, epochs=2), use_gpu=False)
    for kind in kinds:
        paths = export_network(recommender, tmp_path / "out", kind)
        assert paths == [tmp_path / "out" / f"model.{kind}", tmp_path / "out" / "items.json"]
        check(recommender, tmp_path / "out", {"onnx": onnx, "pt2": program}[kind](paths[0]))


def test_the_program_runs_without_this_package(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["export", f"--checkpoint={run_dir}", "--format=pt2", f"--output={tmp_path}"]
    assert main(given) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/model.pt2", f"{tmp_path}/items.json"]
    code = (
        "import sys, torch\n"
        "sys.modules['recbole_simdiff'] = sys.modules['recbole'] = None  # importing them fails\n"
        f"module = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
        "print(module(torch.tensor([[1, 2]]), torch.tensor([2])).argsort(descending=True).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    recommender = load(run_dir, use_gpu=False)
    (answer,) = recommender.recommend([["i1", "i2"]], k=12, exclude_seen=False)
    order = json.loads(done.stdout)[0]
    assert [recommender.item_ids[i] for i in order if i] == answer.items


@pytest.mark.parametrize("model", ["DreamRec", "NextItNet", "GRU4Rec"])
def test_models_that_cannot_be_exported_say_so(tmp_path: Path, model: str) -> None:
    """One draws, one encodes otherwise, of one torch fixes the length."""
    recommender = load(train(tmp_path, model), use_gpu=False)
    with pytest.raises(UserError, match=f"model={model} cannot be exported"):
        export_network(recommender, tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


def test_a_network_that_scores_otherwise_is_not_written(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = ScoringNetwork.forward
    monkeypatch.setattr(ScoringNetwork, "forward", lambda self, *given: stock(self, *given) + 0.01)
    with pytest.raises(UserError, match=r"its scores differ from those .* by up to 0\.01"):
        export_network(recommender, tmp_path, "pt2")
    assert not (tmp_path / "model.pt2").exists()


def test_histories_have_no_place_in_a_network(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["export", f"--checkpoint={run_dir}", "--format=onnx", f"--output={tmp_path}"]
    assert main([*given, "--histories=-"]) == 2
    assert "--histories belongs to vectors" in capsys.readouterr().err
