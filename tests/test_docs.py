"""Tables of the documentation are what records say; links lead somewhere, commands parse."""

import ast
import importlib
import re
import runpy
import shlex
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import render
import yaml

import recbole_simdiff
from recbole_simdiff.cli.parser import COMMANDS, build_parser, parse, split

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES: dict[Path, dict[str, str]] = render.pages()


def test_tables_are_those_of_the_records() -> None:
    for page, tables in PAGES.items():
        text = page.read_text()
        assert render.filled(text, tables) == text, f"run docs/results/render.py: {page.name}"


def test_a_changed_number_would_be_seen() -> None:
    for page, tables in PAGES.items():
        first = ((name, text) for name, text in tables.items() if " | " in text)
        name, table = next(first, ("", ""))
        if not name:  # a page with what a benchmark printed
            continue
        cell = table.splitlines()[2].split(" | ")[1]
        forged = page.read_text().replace(table, table.replace(cell, "0.9999"))
        assert render.filled(forged, {name: table}) != forged


def test_a_table_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place"):
        render.filled("no comments here", {"overview": "|"})


def anchors(text: str) -> set[str]:
    """Names of the headings of a page, as its links write them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def clicks() -> dict[Path, int]:
    """Page -> how many links lead to it from README.md, at least."""
    found, reached = {ROOT / "README.md": 0}, [ROOT / "README.md"]
    for page in reached:
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked not in found:
                found[linked] = found[page] + 1
                reached.append(linked)
    return found


# Questions of a newcomer -> the page that answers.
QUESTIONS = {
    "how do I train on my CSV": "your-data.md",
    "which model should I use, and why": "which-model.md",
    "how do I reproduce the table": "results.md",
    "how do I serve": "serving.md",
    "how do I add a model": "your-model.md",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_answered_within_two_clicks(question: str) -> None:
    assert clicks()[ROOT / "docs" / QUESTIONS[question]] <= 2


def test_every_page_is_within_three_clicks() -> None:
    found = clicks()
    assert {page for page in TEXTS if found.get(page, 9) > 3} == set()


def commands_of(text: str) -> Iterator[str]:
    """Complete command lines; those with a shell's variable or an ellipsis are left out."""
    start = r"^ *(?:.*\| *)?python run_recbole_simdiff\.py (.*)$"
    for line in re.findall(start, text.replace("\\\n", " "), re.MULTILINE):
        if "..." not in line and "$" not in line:
            yield line.partition(" > ")[0].partition("   #")[0]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for line in commands_of(page.read_text()):
        arguments = split(shlex.split(line))
        command = importlib.import_module(f"recbole_simdiff.cli.{COMMANDS[arguments[0]].module}")
        _, rest = parse(build_parser(arguments[0], command.add_arguments), arguments)
        assert all(re.match(r"--\w+(=|$)", option) for option in rest), rest


def python_blocks(text: str) -> Iterator[str]:
    """Fenced blocks of Python, and indented ones that import the package."""
    yield from re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE):
        if re.search(r"^    (from|import) ", block, re.MULTILINE):
            yield textwrap.dedent(block)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_python_parses_and_its_imports_exist(page: Path) -> None:
    for block in python_blocks(page.read_text()):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("recbole_simdiff"):
                module = importlib.import_module(str(node.module))
                assert {alias.name for alias in node.names} <= set(dir(module)), page.name


def test_the_pages_have_python() -> None:
    assert sum(len(list(python_blocks(page.read_text()))) for page in TEXTS) >= 8


def test_the_readme_has_commands() -> None:
    assert len(list(commands_of((ROOT / "README.md").read_text()))) >= 9


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_no_command_is_part_of_a_list(page: Path) -> None:
    """After a list item, indented lines are the item's text, not code."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```", "-", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if line.strip()]
    for before, line in pairwise(lines):
        in_list = re.match(r"[-*] |\d+\. | {2,3}\S", before)
        assert not (in_list and line.startswith("    ")), line


def test_examples_of_style_are_in_the_code() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    examples = re.findall(r"\(`(\S+\.py)`\):\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for file, code in examples:
        assert code in (ROOT / "recbole_simdiff" / file).read_text(), file


def test_the_citation_has_what_its_format_requires() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= set(cited)
    assert cited["version"] == recbole_simdiff.__version__


def test_figures_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "docs" / "figures"
    monkeypatch.syspath_prepend(str(folder))
    figures = runpy.run_path(str(folder / "draw.py"))["figures"]()
    assert set(figures) == {path.name for path in folder.glob("*.svg")}
    for name, content in figures.items():
        assert (folder / name).read_text() == content, f"run docs/figures/draw.py: {name}"
