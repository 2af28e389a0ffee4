"""The code cells of docs/tour.ipynb run in order, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
RUN = """
import json, sys
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "cell", "exec"), names)
result, refreshed, kept = names["result"], names["refreshed"], names["kept"]
means = kept.groupby("row")["ndcg@10"].mean()
answers = names["recommender"].recommend([["p3", "p4"]], k=3)
print(json.dumps({
    "epochs": [names["longer"].epochs, refreshed.epochs],
    "items": answers[0].items,
    "means": means.to_dict(),
    "curve": len(names["curve"]),
    "log": [path.read_text() for path in Path(refreshed.run_dir).glob("*.log")],
}))
"""


def test_its_cells_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(NOTEBOOK.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epochs"] == [10, 2]
    assert found["curve"] == 10
    assert set(found["items"]) & {"p5", "p6"}  # one of the two that mostly follow p4
    assert found["means"]["SASRecCE"] > found["means"]["Pop"]
    said = "40 items carried over, 0 gone, 1 new (1 from the items they occur with"
    assert said in found["log"][0]


def test_it_is_a_notebook_without_outputs() -> None:
    """Outputs would be numbers of one machine."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
