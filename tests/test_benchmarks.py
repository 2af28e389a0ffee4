"""What the benchmarks say of limits, of late processes and of cases that are not tried."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import growth, inference, measure, peers
from tests.benchmarks.figures import LIMITS, Figures, Limit
from tests.benchmarks.process import Child, Ended, Late

ECHO = """
import sys, time
from tests.benchmarks.process import serve
def answer(wait, n):
    print("not an answer")
    time.sleep(wait)
    return {"n": n + 1}
serve(answer)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that answers after a while with the next number."""
    (tmp_path / "echo_process.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[1]}")
    child = Child("echo_process")
    yield child
    child.close()


def test_a_figure_beyond_its_limit_is_missed() -> None:
    figures = Figures()
    figures.keep("simdiffrec", LIMITS["simdiffrec"].most or 0)
    figures.keep("simdiffrec to RecBole", LIMITS["simdiffrec to RecBole"].least or 0)
    assert figures.missed() == []
    figures.keep("own", 1.2, Limit(1.1, None, "a ratio"))
    figures.keep("low", 0.9, Limit(None, 1.0, "a ratio"))
    figures.keep("unknown", math.nan, Limit(1.0, None, "a ratio"))
    assert figures.missed() == ["own", "low", "unknown"]
    lines = figures.table().splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "MISSED", "MISSED", "MISSED"]
    assert lines[2].endswith("1.20, at most 1.1 (a ratio)")


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (1.5, 1)])
def test_the_command_says_whether_one_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, code: int
) -> None:
    def loss(bench: benchmarks.Bench) -> None:
        bench.figures.keep("softmax", value)

    monkeypatch.setattr(benchmarks.Bench, "softmax_loss", loss)
    assert benchmarks.main(["--parts=loss"]) == code
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["--parts=loss,speed"])
    assert "speed must be of loss, overhead, plain" in capsys.readouterr().err


def test_a_process_answers_or_is_late_or_gone(echo: Child) -> None:
    assert echo.ask(60, wait=0, n=1) == {"n": 2}
    with pytest.raises(Late):
        echo.ask(0.2, wait=60, n=1)
    with pytest.raises(Ended, match="it ended with code -9"):
        echo.ask(60, wait=0, n=1)


def test_a_step_that_does_not_fit_is_not_tried() -> None:
    assert growth.Case("RecBole's SASRec", 1_200_000, 2048, 6).predicted() > growth.MOST
    assert growth.Case("RecBole's SASRec", 1_200_000, 256, 6).predicted() < growth.MOST


def test_growth_prints_what_it_does_not_try(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [
        growth.Case("RecBole's SASRec", 1_200_000, 2048, 6),
        growth.Case("encoder", 100, 4, 6),
        growth.Case("DreamRec", 100, 4, 6),
        growth.Case("SimDiffRec, approximate", 1_200_000, 256, 6),
    ]
    monkeypatch.setattr(growth, "cases", lambda short: listed)
    monkeypatch.setattr(growth, "PATIENCE", 0.0)
    figures = Figures()
    growth.run(figures)
    out = capsys.readouterr().out.splitlines()
    assert out[1].endswith("not tried, predicted 38 GiB, more than 20")
    assert all("not tried, no time left" in line for line in out[2:])
    assert figures.missed() == ["approximate step", "approximate memory"]


@pytest.mark.parametrize("subject", growth.SUBJECTS)
def test_a_step_of_each_subject_is_measured(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(collect=lambda: 0)  # of all that the tests hold it takes seconds
    monkeypatch.setattr(measure, "gc", nothing)
    found = growth.step(subject, n_items=50, rows=4, length=6)
    assert found["seconds"] > 0
    assert found["peak"] > found["over_start"]


@pytest.mark.parametrize("name", inference.MODELS)
def test_each_model_answers_requests(name: str) -> None:
    server = inference.Server(name, 60)
    exact = server.answer("exact", requests=2, rows=3)
    assert len(exact["seconds"]) == 2
    assert exact["batch"] > 0
    pytest.importorskip("faiss")
    if name != inference.STOCK:
        assert "error" not in server.answer("approximate", requests=1, rows=2)


def test_peers_that_are_not_installed_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "training_part", lambda data_path: "user,item,time")
    peers.run("nowhere", pytest.fail, sys.executable)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("peers: skipped, ")
    assert "No module named 'rectools'" in line
