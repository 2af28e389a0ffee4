"""The commands of docs/your-data.md run as they are written."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from recbole_simdiff.cli.main import main
from tests.conftest import SEQUENCES

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"
COMMANDS = re.findall(r"^    python run_recbole_simdiff\.py (.+)$", PAGE.read_text(), re.MULTILINE)


def test_its_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared, trained = map(shlex.split, COMMANDS)
    lines = [f"{u},{i},2024-05-{t + 1:02}" for u, s in SEQUENCES.items() for t, i in enumerate(s)]
    Path("log.csv").write_text("\n".join(["customer,sku,bought_at", *lines]) + "\n")
    ids = sorted({item for items in SEQUENCES.values() for item in items})
    np.savez("text.npz", ids=ids, vectors=np.random.default_rng(1).normal(size=(len(ids), 384)))
    assert main([*prepared, "--k_core=0"]) == 0
    assert "times taken for dates" in capsys.readouterr().out
    small = ["--epochs=1", "--topk=[2]", "--valid_metric=NDCG@2", "--use_gpu=False"]
    assert main([*trained, *small]) == 0
    assert "mode frozen" in capsys.readouterr().err
    (result,) = Path("saved").glob("*/result.json")
    assert json.loads(result.read_text())["test"]


def test_its_reduction_keeps_the_leading_components() -> None:
    """Of vectors in a plane, two numbers keep all distances."""
    (code,) = re.findall(r"(^    centred = .+\n    reduced = .+$)", PAGE.read_text(), re.MULTILINE)
    assert code.split("[:64]")[0].endswith("full_matrices=False)[2]")
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 9))
    centred = vectors - vectors.mean(0)
    reduced = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    assert np.allclose(reduced @ reduced.T, centred @ centred.T)
