"""What tables show: best and second, deviations, citations, faults; and that CSV is exact."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.evaluation.protocols import KEPT, REMOVED
from recbole_simdiff.experiments import tables
from recbole_simdiff.experiments.results import Cell, Comparison
from recbole_simdiff.experiments.spec import Cited
from tests.experiments.test_results import experiment, measured

CITED = Cited(
    "paper, Table 2",
    KEPT,
    ("hit@5", "ndcg@5", "hit@10", "ndcg@10"),
    {"toy": {"A": [0.0572, 0.0310, 0.0932, 0.0427], "B": [0.0338, 0.0191, 0.0562, 0.0252]}},
)


@pytest.fixture
def cells(tmp_path: Path) -> Any:
    ranks = {"A": {1: [1, 9], 2: [1, 1]}, "B": {1: [1, 1], 2: [1, 1]}, "C": {1: [9, 9]}}
    return {Cell(row, "toy", None): measured(tmp_path / row, own) for row, own in ranks.items()}


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_markdown(cells: Any) -> None:
    own = experiment(metrics=("hit@5",), cited=(CITED,))
    text = tables.markdown(tables.rows(own, cells, "toy", KEPT), own.metrics, 3)
    head, _, a, b, c, cited, impossible, improved = rows_of(text)
    assert head == ["row", "seeds", "hit@5"]
    assert a == ["A", "2", "<u>0.750 ± 0.354</u>"]
    assert b == ["B", "2", "**1.000 ± 0.000**"]
    assert c == ["C", "1", "0.000"]  # one seed has no deviation
    assert cited == ["*A [paper, Table 2]*", "-", "0.057"]  # cited rows do not compete
    assert impossible[0] == "*B [paper, Table 2]* ✗"
    assert improved == ["best over second", "-", "+33.3 %"]


def test_cited_rows_stand_under_their_own_protocol_only(cells: Any) -> None:
    own = experiment(metrics=("hit@5",), cited=(CITED,))
    kept, removed = (tables.rows(own, cells, "toy", p) for p in (KEPT, REMOVED))
    assert [line.label for line in removed] == ["A", "B", "C"]
    assert len(kept) == 5
    assert kept[4].faults
    assert "0.0061" in kept[4].faults[0]
    assert not kept[3].faults


def test_a_metric_that_a_citation_lacks_is_a_dash(cells: Any) -> None:
    own = experiment(metrics=("hit@5", "mrr@10"), cited=(CITED,))
    text = tables.markdown(tables.rows(own, cells, "toy", KEPT), own.metrics, 4)
    assert rows_of(text)[5][2:] == ["0.0572", "-"]


def test_text_from_elsewhere_is_no_html_and_ends_no_cell(tmp_path: Path) -> None:
    """A label comes from an experiment file, which may be anybody's."""
    label = "<img src=x onerror=alert(1)> A & B"
    cells = {Cell(label, "toy", None): measured(tmp_path / "a", {1: [1, 9]})}
    own = replace(experiment(metrics=("hit@5",)), rows={label: {}})
    text = tables.markdown(tables.rows(own, cells, "toy", KEPT), own.metrics, 2)
    assert "| &lt;img src=x onerror=alert(1)&gt; A &amp; B | 1 |" in text
    assert "<img" not in text
    assert tables.plain("a|b\nc") == r"a\|b c"


def test_ties_share_the_first_place(tmp_path: Path) -> None:
    same = {row: {1: [1, 9]} for row in "AB"} | {"C": {1: [9, 9]}}
    cells = {Cell(r, "toy", None): measured(tmp_path / r, own) for r, own in same.items()}
    own = experiment(metrics=("hit@5",))
    text = tables.markdown(tables.rows(own, cells, "toy", KEPT), own.metrics, 2)
    assert [row[2] for row in rows_of(text)[2:5]] == ["**0.50**", "**0.50**", "<u>0.00</u>"]
    assert rows_of(text)[-1] == ["best over second", "-", "-"]  # so many per cent of 0 is nothing


def test_latex(cells: Any) -> None:
    own = experiment(metrics=("hit@5",), cited=(CITED,))
    found = tables.rows(own, cells, "toy", KEPT)
    text = tables.latex(found, own.metrics, 3, "50 % of w/o k_noise")
    assert r"\caption{50 \% of w/o k\_noise}" in text
    assert r"B & 2 & \textbf{1.000 $\pm$ 0.000} \\" in text
    assert r"A & 2 & \underline{0.750 $\pm$ 0.354} \\" in text
    assert r"\textit{B [paper, Table 2]} $\times$ & -- & 0.034 \\" in text
    assert r"best over second & -- & +33.3 \% \\" in text
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lrr}"):
        assert part in text


def test_csv_keeps_every_digit() -> None:
    value = 0.1 + 0.2
    text = tables.as_csv([{"row": "a, b", "value": value}])
    (back,) = csv.DictReader(io.StringIO(text))
    assert back["row"] == "a, b"
    assert float(back["value"]) == value
    assert tables.as_csv([]) == ""


def test_comparisons_as_text() -> None:
    nan = float("nan")
    one = Comparison(
        "B", "A", "toy", "hit@5", KEPT, 0.01, 0.1, nan, 0.0001, 0.2, 0.005, 0.015, 1, 9, 0.04
    )
    assert rows_of(tables.comparisons([one]))[2] == [
        *(
            "B",
            "A",
            "hit@5",
            "+0.0100",
            "+10.0",
            "[+0.0050, +0.0150]",
            "+0.200",
            "0.040",
            "< 0.001",
        ),
        "-",
    ]
    assert rows_of(tables.comparisons([replace(one, effect=nan)]))[2][6] == "-"


def test_marks_are_those_of_the_wilcoxon_tests(cells: Any) -> None:
    nan = float("nan")
    one = Comparison("B", "A", "toy", "hit@5", KEPT, 0.2, 0.1, nan, 0.9, 0.2, 0, 1, 1, 9, 0.004)
    found = tables.marks([one, replace(one, row="C", p_wilcoxon=0.02)])
    assert found == {("B", "hit@5"): 0.01, ("C", "hit@5"): 0.05}
    assert tables.marks([replace(one, p_wilcoxon=p) for p in (0.05, 1.0, nan)]) == {}
    own = experiment(metrics=("hit@5",), cited=(CITED,), reference="A_1")
    rows = tables.rows(own, cells, "toy", KEPT)
    text = tables.markdown(rows, own.metrics, 1, found, "A_1")
    assert [row[2] for row in rows_of(text)[2:5]] == [
        *("<u>0.8 ± 0.4</u>", "**1.0 ± 0.0**‡", "0.0†")
    ]
    assert "† p < 0.05, ‡ p < 0.01: differs from A_1, two-sided Wilcoxon" in text
    source = tables.latex(rows, own.metrics, 1, "T", found, "A_1")
    assert r"B & 2 & \textbf{1.0 $\pm$ 0.0}$^{\ddagger}$ \\" in source
    assert r"C & 1 & 0.0$^{\dagger}$ \\" in source
    assert r"differs from A\_1, two-sided" in source
    assert source.index(r"\end{tabular}") < source.index("footnotesize")
    assert source.endswith(r"\end{table}")
    cited = next(line for line in source.splitlines() if "B [paper" in line)
    assert "dagger" not in cited
    assert "Wilcoxon" not in tables.latex(rows, own.metrics, 1, "T")


def test_a_caption_names_no_folder_of_this_machine() -> None:
    command = {"data_path": "/home/me/data", "checkpoint_dir": "/tmp/x", "epochs": 3}
    command |= {"item_table": "/home/me/saved/SASRecCE-toy"}
    values = {"eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user"}}
    text = tables.caption(
        experiment(command=command), "toy", KEPT, [values | {"valid_metric": "NDCG@10"}]
    )
    assert text.endswith("With epochs=3, item_table=SASRecCE-toy.")
    assert "/" not in text


@pytest.mark.parametrize(
    ("changes", "args", "protocol", "parts"),
    [
        (
            {},
            {},
            KEPT,
            ["leave-one-out by time,", "history kept (RecBole's protocol)", "seeds 1, 2"],
        ),
        ({"seeds": (1,)}, {}, REMOVED, ["history removed (earlier items out", "; seed 1."]),
        (
            {"command": {"epochs": 1}},
            {"split": {"RS": [8, 1, 1]}, "group_by": None},
            KEPT,
            ["split {'RS': [8, 1, 1]} by time, of all users together", "With epochs=1."],
        ),
    ],
)
def test_the_caption_says_how_it_was_measured(
    changes: Any, args: Any, protocol: str, parts: list[str]
) -> None:
    values = {"eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user"} | args}
    values |= {"valid_metric": "NDCG@10"}
    text = tables.caption(
        experiment(**changes), "toy", protocol, [values, values | {"valid_metric": "MRR@10"}]
    )
    for part in ["Parts. toy, test", "best epoch by validation NDCG@10 or MRR@10", *parts]:
        assert part in text
