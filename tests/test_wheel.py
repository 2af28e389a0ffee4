"""The wheel works on its own: properties ship inside it, and the checkout is not needed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(("kind", "least"), [("yaml", 15), ("hyper", 37)])
def test_wheel_ships_every_property_file(installed: Path, kind: str, least: int) -> None:
    inside = {p.relative_to(installed / "recbole_simdiff") for p in installed.rglob(f"*.{kind}")}
    ours = {p.relative_to(ROOT) for p in (ROOT / "properties").rglob(f"*.{kind}")}
    assert len(ours) >= least
    assert inside == ours


def test_the_wheel_says_that_it_is_typed(installed: Path) -> None:
    assert (installed / "recbole_simdiff" / "py.typed").is_file()


def test_wheel_trains_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    script = (
        "import recbole_simdiff, sys; from recbole_simdiff.cli.main import main; "
        "print(recbole_simdiff.__file__); "
        "sys.exit(main(['--epochs=1', '--reverse_steps=1', '--MAX_ITEM_LIST_LENGTH=5',"
        " '--train_sampling=prefix_last', '--train_batch_size=2048', '--hidden_size=8',"
        " '--cl_weight=0', '--show_progress=False']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert str(installed) in result.stdout
    assert "history removed" in result.stdout
