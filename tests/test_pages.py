"""What the pages tell a reader to type or to import is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from recbole_simdiff.cli.main import _overrides
from recbole_simdiff.cli.parser import COMMANDS, build_parser, parse, split
from recbole_simdiff.config.config import Config

DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(r"^\| .+ \| (.+) \|$", re.MULTILINE)
COMMAND = re.compile(r"python run_recbole_simdiff\.py (.+)")
RIGHT = [
    text.strip("`")
    for text in ROW.findall((DOCS / "from-recbole.md").read_text())
    if text.startswith("`")
]
REFRESH = re.findall(rf"^    {COMMAND.pattern}$", (DOCS / "refresh.md").read_text(), re.MULTILINE)


def check_command(line: str) -> None:
    """Options are known, and so are configuration keys."""
    arguments = split(shlex.split(line))
    command = importlib.import_module(f"recbole_simdiff.cli.{COMMANDS[arguments[0]].module}")
    namespace, rest = parse(build_parser(arguments[0], command.add_arguments), arguments)
    values = _overrides(rest)
    if arguments[0] == "train" and not namespace.resume:
        Config(namespace.model or "SASRec", namespace.dataset or "ml-100k", overrides=values)
    else:
        assert not values, line


def check_import(line: str) -> None:
    module, name = re.fullmatch(r"from (\S+) import (\w+)", line).groups()  # type: ignore[union-attr]
    assert callable(getattr(importlib.import_module(module), name))


def test_the_pages_have_something_to_check() -> None:
    assert len(RIGHT) >= 20
    assert len(REFRESH) == 6


@pytest.mark.parametrize("text", RIGHT)
def test_the_right_side_is_there(text: str) -> None:
    if found := COMMAND.fullmatch(text):
        check_command(found[1])
    else:
        check_import(text)


@pytest.mark.parametrize("line", REFRESH)
def test_the_commands_of_the_page_are_there(line: str) -> None:
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "tune --params_file=x.hyper",
        "--modle=SASRec",
        "--hiden_size=3",
        "checkpoint melt --output=x",
    ],
)
def test_what_is_not_there_would_be_seen(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(line)


@pytest.mark.parametrize("name", ["tour.ipynb", "from-recbole.md", "refresh.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (DOCS / name).read_text())
    for link in links:
        assert link.startswith("http") or (DOCS / link).exists(), link
