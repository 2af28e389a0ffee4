"""Tables of the documentation are what the recorded results say."""

import runpy
from pathlib import Path

import pytest

RENDER = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "results" / "render.py"))
PAGES: dict[Path, dict[str, str]] = RENDER["pages"]()


def test_tables_are_those_of_the_records() -> None:
    for page, tables in PAGES.items():
        text = page.read_text()
        assert RENDER["filled"](text, tables) == text, f"run docs/results/render.py: {page.name}"


def test_a_changed_number_would_be_seen() -> None:
    for page, tables in PAGES.items():
        name, table = next(iter(tables.items()))
        cell = table.splitlines()[2].split(" | ")[1]
        forged = page.read_text().replace(table, table.replace(cell, "0.9999"))
        assert RENDER["filled"](forged, {name: table}) != forged


def test_a_table_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place"):
        RENDER["filled"]("no comments here", {"overview": "|"})
