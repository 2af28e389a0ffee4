"""A search by Ray Tune, with today's ray in an environment of its own.

RecBole pins a ray that does not run with today's libraries. So this file makes an environment with
a newer one, which sees the libraries of this one, and skips where pip cannot install it.
"""

import csv
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from recbole_simdiff.config.layers import read_yaml
from tests.conftest import SEQUENCES, SMALL, write_inter

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the environment with ray."""
    folder = tmp_path_factory.mktemp("ray")
    venv.create(folder, with_pip=True)
    program = folder / "bin" / "python"
    pip = [program, "-m", "pip", "install", "--quiet", "ray[tune]"]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install ray: {done.stderr.strip().splitlines()[-1]}")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    places = [ROOT, *(place for place in sys.path if place.endswith("site-packages"))]
    Path(paths["purelib"], "tests.pth").write_text("".join(f"{place}\n" for place in places))
    return program


def test_a_search_by_todays_ray(python: Path, tmp_path: Path) -> None:
    write_inter(tmp_path / "dataset", "toy", SEQUENCES)
    space = tmp_path / "my.hyper"
    space.write_text("learning_rate loguniform -7,-3\nhidden_dropout_prob uniform 0,0.5\n")
    keys = ("load_col", "MAX_ITEM_LIST_LENGTH", "hidden_size", "inner_size", "topk", "valid_metric")
    given = [f"--{key}={SMALL[key]}" for key in keys]
    given += ["--model=SASRecCE", "--dataset=toy", "--epochs=2", "--show_progress=False"]
    given += [f"--data_path={tmp_path / 'dataset'}", "--use_gpu=False", f"--space={space}"]
    given += ["--engine=ray", "--trials=4", "--jobs=2", f"--output={tmp_path / 'results'}"]
    done = subprocess.run(
        [python, ROOT / "run_recbole_simdiff.py", "tune", *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "tune-SASRecCE-toy"
    with open(folder / "trials.csv", newline="") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["done"] * 4
    assert len({trial["learning_rate"] for trial in trials}) == 4
    best = max(trials, key=lambda trial: float(trial["ndcg@5"]))
    assert read_yaml(folder / "best.yaml")["learning_rate"] == float(best["learning_rate"])
    assert len(list(folder.glob("trials/*/result.json"))) == 4
    assert "best setting" in done.stdout
