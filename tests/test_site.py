"""The site of the documentation: its made pages say what the code says, and it builds strictly."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from recbole_simdiff.cli.parser import COMMANDS
from recbole_simdiff.config.layers import read_yaml

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for name in ("overall.yaml", "model/*", "dataset/*", "preset/*/*", "tuned/*/*")
    for path in sorted((ROOT / "properties").glob(name))
]


def module(name: str) -> ModuleType:
    """A script of ``docs/``, imported."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


REFERENCE = module("reference")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_reference_has_every_option_of_the_help(command: str) -> None:
    parser = REFERENCE.parser_of(command)
    lines = re.findall(r"^  (-.*?)(?:  |$)", parser.format_help(), re.MULTILINE)
    shown = set(re.findall(r"--\w+", " ".join(lines))) - {"--help"}
    rows = REFERENCE.options_of(parser)
    hidden = {"--action"} if command == "checkpoint" else set()  # its first argument
    assert shown
    assert shown | hidden == set(re.findall(r"--\w+", " ".join(names for names, _ in rows)))


def test_there_are_files_of_settings() -> None:
    assert len(FILES) >= 60


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_reference_has_every_setting(path: Path) -> None:
    found = list(REFERENCE.settings(path.read_text()))
    written = read_yaml(path)
    assert [setting.key for setting in found] == list(written)
    for setting in found:
        if not setting.value.startswith(("inter:", "split:")):  # a nested block
            value = yaml.safe_load(f"key: {setting.value}")["key"]
            assert str(value) == str(written[setting.key]) or float(value) == written[setting.key]


def test_comments_go_on_below() -> None:
    text = "# top\n# more\n\n# ---- part [P]\na: 1  # one\n     # two\n"
    text += "b: x\n# other\nc:   # three\n  d: 4"
    assert REFERENCE.opening(text) == "top more"
    assert [tuple(setting) for setting in REFERENCE.settings(text)] == [
        ("part [P]", "a", "1", "one two"),
        ("part [P]", "b", "x", ""),
        ("part [P]", "c", "d: 4", "three"),
    ]


def test_bars_do_not_end_a_cell() -> None:
    table = REFERENCE.table(["a"], [["x | y"], ["`x|y`"]])
    assert table.splitlines()[2:] == ["| x &#124; y |", "| `x\\|y` |"]


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(nav) == len(set(nav))
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    made = {name for name in nav if name not in written}
    assert written <= set(nav)
    assert {name for name in made if name.startswith("reference/")} == set(REFERENCE.pages())
    assert {n for n in made if "/" not in n} == {
        "index.md",
        "tour.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text()):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag), f"{page.name}: {tag}"
    assert (tmp_path / "search" / "search_index.js").is_file()
