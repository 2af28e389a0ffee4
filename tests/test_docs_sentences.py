"""Figures in the prose of README.md and docs/results.md are those of the records."""

import csv
import re
from pathlib import Path

import pytest
import render
import sentences

PAGES = sentences.pages()
FIGURE = re.compile(r"\d*\.\d{2,}|\d+ %|\d+ s\b|\d,\d{3}")
# Heading of a part whose every figure is checked -> the page, and the heading that follows.
PARTS = {
    "README.md": ("<!-- end of overview -->", "\n## "),
    "results.md": ("\n## What the runs say", "\n## "),
}


def part(page: Path) -> str:
    """The part of a page that tells what the results are."""
    start, end = PARTS[page.name]
    return page.read_text().partition(start)[2].partition(end)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_those_of_the_records(page: Path) -> None:
    text = sentences.plain(page.read_text())
    for sentence in PAGES[page]:
        assert sentence in text, f"{page.name} should say: {sentence}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_other_figure_is_in_the_text(page: Path) -> None:
    text = sentences.plain(part(page))
    assert text
    for sentence in [*PAGES[page], *sentences.UNRECORDED]:
        text = text.replace(sentence, "")
    assert FIGURE.findall(text) == []


def test_what_has_no_record_is_still_said() -> None:
    text = sentences.plain(part(render.ROOT / "docs" / "results.md"))
    assert [known for known in sentences.UNRECORDED if known not in text] == []


def test_a_changed_record_changes_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sentences.rows()
    run = found["CL4SRec"].runs[0]
    worse = {**run.metrics["test", "history kept"], "ndcg@10": 0.03}
    monkeypatch.setitem(run.metrics, ("test", "history kept"), worse)
    assert "gain -28 to 7 %" in sentences.readme(found)[1]


def test_what_make_run_printed_is_the_run_of_the_list() -> None:
    lines = (render.HERE / "make-run.txt").read_text().splitlines()
    with (render.HERE / "trials.csv").open(newline="") as file:
        trial = next(t for t in csv.DictReader(file) if t["ended"] == "epochs: make run")
    assert f"best epoch {trial['best epoch']}, last 39, {trial['seconds']} s" in lines[0]
    column = lines[1].split().index("ndcg@10") + 1  # a protocol is two words
    shown = {tuple(line.split()[:3]): line.split()[column] for line in lines[2:]}
    expected = f"{float(trial['valid NDCG@10 (history kept)']):.4f}"
    assert shown["valid", "history", "kept"] == expected
