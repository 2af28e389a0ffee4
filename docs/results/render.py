"""Write the tables of README.md and docs/results.md from the files of this folder.

    python docs/results/render.py

``amazon-beauty.csv`` holds what ``result.json`` of each run says, digit by digit (rows marked † are
void, see README.md), ``amazon-beauty-validation.csv`` what some runs found after each epoch,
``ml-100k/`` what experiments wrote, and ``speed.txt`` what ``python -m tests.benchmarks`` printed.
What is published is read from ``properties/experiment/table2.yaml``.
"""

import csv
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import indent

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROTOCOLS = ("history kept", "history removed")
METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20")
NAMES = {"hit": "HR", "ndcg": "NDCG"}
AFTER = (5, 10, 20, 30, 40, 60, 100)  # epochs trained


def main() -> None:
    """Put every table in its place, between two comments that name it."""
    for page, tables in pages().items():
        page.write_text(filled(page.read_text(), tables))


def pages() -> dict[Path, dict[str, str]]:
    """Page -> name of a table -> its Markdown."""
    with (HERE / "amazon-beauty.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    with (HERE / "amazon-beauty-validation.csv").open(newline="") as file:
        epochs_seen = list(csv.DictReader(file))
    overview = {
        "overview": table(overview_rows(lines)),
        "learning": table(learning_rows(epochs_seen)),
        "table3": of_experiment(HERE / "ml-100k" / "table3.md"),
        "speed": indent((HERE / "speed.txt").read_text(), "    "),
    }
    details = {
        f"{split}, {protocol}": table(detail_rows(lines, split, protocol))
        for split in ("test", "valid")
        for protocol in PROTOCOLS
    }
    return {
        ROOT / "README.md": overview,
        ROOT / "docs" / "results.md": details
        | {"commands": commands(lines), "figure4": of_experiment(HERE / "ml-100k" / "figure4.md")},
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: if a table has no place.
    """
    for name, content in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (start and end):
            raise ValueError(f"no place for the table {name!r}")
        text = f"{before}{start}{content}{end}{after}"
    return text


def overview_rows(lines: Sequence[dict[str, str]]) -> Iterator[Sequence[str]]:
    """Test metrics of each run, history kept, beside the published ones of its model."""
    shown = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")
    yield "model", *map(heading, shown), "valid. NDCG@10", "best epoch", "published HR@10 / NDCG@10"
    published = cited()
    validated = {line["row"]: line for line in lines if is_of(line, "valid", "history kept")}
    for line in lines:
        if is_of(line, "test", "history kept"):
            found = published.get(line["row"].removesuffix(" †"))
            yield (
                line["row"],
                *(digits(line[name]) for name in shown),
                digits(validated[line["row"]]["ndcg@10"]),
                epochs(line),
                f"{digits(found['hit@10'])} / {digits(found['ndcg@10'])}" if found else "",
            )


def detail_rows(
    lines: Sequence[dict[str, str]], split: str, protocol: str
) -> Iterator[Sequence[str]]:
    """Every metric of one split under one protocol."""
    yield "model", *map(heading, METRICS), "best epoch"
    for line in lines:
        if is_of(line, split, protocol):
            yield line["row"], *(digits(line[name]) for name in METRICS), epochs(line)


def learning_rows(lines: Sequence[dict[str, str]]) -> Iterator[Sequence[str]]:
    """Validation NDCG@10 after so many epochs; nothing where a run had ended."""
    yield "validation NDCG@10 after epochs", *map(str, AFTER), "best"
    found: dict[str, dict[int, str]] = {}
    for line in lines:
        found.setdefault(line["row"], {})[int(line["epochs"])] = line["ndcg@10"]
    for row, values in found.items():
        seen = (digits(values[n]) if n in values else "" for n in AFTER)
        yield row, *seen, digits(max(values.values(), key=float))


def commands(lines: Sequence[dict[str, str]]) -> str:
    """The command of each run."""
    once = {line["row"]: line for line in lines}.values()
    body = "".join(f"    $R {line['arguments']}\n" for line in once)
    # They ran before patience was counted in updates, too.
    start = 'R="python run_recbole_simdiff.py --dataset=amazon-beauty --stopping_updates=0"'
    return f"\n    {start}\n{body}\n"


def of_experiment(path: Path) -> str:
    """The tables of an experiment's ``table.md`` with their captions, without those of tests."""
    parts = path.read_text().split("\n\n")
    pairs = [pair for pair in pairwise(parts) if "all items ranked" in pair[0]]
    return "".join(f"\n{caption}\n\n{content.strip()}\n" for caption, content in pairs) + "\n"


def cited() -> dict[str, dict[str, str]]:
    """What SimDiffRec's Table 2 says of amazon-beauty: row -> metric -> value."""
    text = (ROOT / "properties" / "experiment" / "table2.yaml").read_text()
    (source,) = yaml.safe_load(text)["cited"]
    return {
        row: dict(zip(source["metrics"], map(str, values), strict=True))
        for row, values in source["values"]["amazon-beauty"].items()
    }


def table(rows: Iterator[Sequence[str]]) -> str:
    """Markdown of a heading and rows."""
    head, *body = rows
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def is_of(line: dict[str, str], split: str, protocol: str) -> bool:
    """Whether the line is of this split and protocol."""
    return (line["split"], line["protocol"]) == (split, protocol)


def epochs(line: dict[str, str]) -> str:
    """Best epoch, counted from 0, of how many; + where the run was stopped by hand."""
    return f"{line['best_epoch']} of {line['epochs']}" + "+" * (line["ended"] == "by hand")


def heading(metric: str) -> str:
    """``hit@10`` as tables write it."""
    name, _, k = metric.partition("@")
    return f"{NAMES[name]}@{k}"


def digits(value: str) -> str:
    """Four digits."""
    return f"{float(value):.4f}"


if __name__ == "__main__":
    main()
