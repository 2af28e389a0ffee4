"""The command for a GPU runs, in its reduced form on the CPU, and says what fails."""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.gpu import parity
from tests.gpu.__main__ import PARTS, main
from tests.gpu.session import OutOfTime, Session, table
from tests.gpu.wheels import needed


def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    assert main(["--device=cpu", f"--output={tmp_path / 'out'}"]) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["part"] for row in rows if "took" in row] == list(PARTS)
    assert len(rows) > 2 * len(PARTS)
    assert not [row for row in rows if "error" in row or "left out" in row]
    text = (tmp_path / "out" / "results.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(PARTS)


def test_a_model_that_differs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, sides = parity.computed, []

    def computed(*args: Any, **values: Any) -> parity.Computed:
        found = stock(*args, **values)
        sides.append(found)
        off = {k: v * 1.01 for k, v in found.losses.items()}
        return found._replace(losses=off) if len(sides) % 3 == 2 else found  # the device's

    monkeypatch.setattr(parity, "computed", computed)
    assert main(["--device=cpu", f"--output={tmp_path}", "--parts=parity"]) == 1
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.01, rel=1e-3)
    assert first["ok"] is False


def test_an_error_ends_its_part_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(session: Session) -> Any:
        yield {"what": "before"}
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setitem(PARTS, "environment", (broken, 1))
    assert main(["--device=cpu", f"--output={tmp_path}", "--parts=environment,memory"]) == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[0] == {"part": "environment", "what": "before"}
    assert rows[1]["error"] == "ZeroDivisionError: by zero"
    assert rows[3]["part"] == "memory"
    assert rows[3]["ok"]


def test_a_part_without_time_says_what_it_leaves_out(tmp_path: Path) -> None:
    session = Session("cpu", "", "toy", tmp_path, reduced=True, seconds=0)
    session.run("part", lambda s: ({"name": name} for name in s.each(["a", "b"])), 10)
    assert session.rows[0] == {"part": "part", "left out": "a, b"}
    session.deadline = float("inf")
    assert list(session.each(["a", "b"])) == ["a", "b"]
    session.deadline = 0.0
    with pytest.raises(OutOfTime, match="a, b"):
        next(session.each(["a", "b"]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--parts=parity,speed", "speed must be of environment, parity"),
        pytest.param(
            "--device=cuda",
            "torch finds no GPU here; --device=cpu runs the reduced form",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_run_is_refused(
    tmp_path: Path, capsys: Any, argument: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([f"--output={tmp_path / 'out'}", argument])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_has_a_column_for_every_key() -> None:
    rows = [{"part": "a", "x": 1}, {"part": "a", "y": "2|3"}, {"part": "a", "took": 4.0}]
    assert table(rows) == "## a\n\n| x | y |\n|---|---|\n| 1 |  |\n|  | 2/3 |\n\n4.0 s\n"


def test_wheels_are_the_needs_of_this_package() -> None:
    names = needed(["numpy"])
    assert {"recbole", "pandas", "scipy", "tensorboard", "grpcio", "texttable"} <= set(names)
    assert not {"torch", "numpy", "ray", "pytest", "optuna"} & set(names)
    for name in names:
        assert Version(version(name))


def test_random_numbers_are_those_of_the_cpu() -> None:
    """On the CPU the block changes nothing; elsewhere its numbers would be these."""
    torch.manual_seed(3)
    wanted = [torch.rand(2), torch.randint(5, (3,)), torch.randn_like(torch.ones(2))]
    torch.manual_seed(3)
    device = torch.device("cpu")
    with parity.HostRandom():
        found = [torch.rand(2, device=device), torch.randint(5, (3,), device=device)]
        found.append(torch.randn_like(torch.ones(2, device=device)))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(autouse=True)
def _same_folder_afterwards() -> Any:
    before = os.getcwd()
    yield
    os.chdir(before)
