"""Write the tables of README.md and of the pages in docs/ from the files of this folder.

    python docs/results/render.py

``runs/`` holds the records of runs that ``keep.py`` took over, ``amazon-beauty.csv`` the metrics
of older ones, ``rows.txt`` the order of the rows, and ``speed.txt`` what ``python -m
tests.benchmarks`` printed. What is published is read from ``properties/experiment/table2.yaml``
and, of other papers, from ``published.yaml``.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent

import yaml

from recbole_simdiff.experiments.results import impossible

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROTOCOLS = ("history kept", "history removed")
METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20")
NAMES = {"hit": "HR", "ndcg": "NDCG"}


def main() -> None:
    """Put every table in its place, between two comments that name it."""
    for page, tables in pages().items():
        page.write_text(filled(page.read_text(), tables))


def pages() -> dict[Path, dict[str, str]]:
    """Page -> name of a table -> its Markdown."""
    lines = recorded()
    details = {
        f"{split}, {protocol}": table(detail_rows(lines, split, protocol))
        for split in ("test", "valid")
        for protocol in PROTOCOLS
    }
    speed = indent((HERE / "speed.txt").read_text(), "    ")
    return {
        ROOT / "README.md": {"overview": table(overview_rows(lines)), "fast": fast()},
        ROOT / "docs" / "results.md": details | {"commands": commands(lines)},
        ROOT / "docs" / "measured.md": {"speed": speed},
        ROOT / "docs" / "impossible.md": {"impossible": checked()},
    }


def recorded() -> list[dict[str, str]]:
    """A line for each run, split and protocol, in the order of ``rows.txt``.

    Raises:
        ValueError: if a row has no place in ``rows.txt``.
    """
    with (HERE / "amazon-beauty.csv").open(newline="") as file:
        lines = [line | {"source": "csv"} for line in csv.DictReader(file)]
    for path in sorted((HERE / "runs").glob("*.json")):
        record = json.loads(path.read_text())
        keys = ("row", "arguments", "best_epoch", "epochs", "ended")
        run = {key: str(record[key]) for key in keys} | {"source": path.name}
        lines += [
            run | {"split": split, "protocol": protocol} | {k: str(v) for k, v in metrics.items()}
            for split in ("valid", "test")
            for protocol, metrics in record[split].items()
        ]
    order = (HERE / "rows.txt").read_text().splitlines()
    return sorted(lines, key=lambda line: order.index(line["row"]))


def fast() -> str:
    """What the benchmark says of the encoder beside RecBole's SASRec."""
    text = (HERE / "speed.txt").read_text()
    ratio = text.partition("(b) both weights 0 : (a) = 1 : ")[2].split()[0]
    return (
        f"- **Fast.** On two CPU cores RecBole's SASRec takes {ratio} times as long for an epoch "
        "as the same encoder here,\n  which computes on real tokens only and never holds a tensor "
        "of batch x length x items\n  ([what was measured](docs/measured.md)).\n"
    )


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
            found = published.get(line["row"])
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


def commands(lines: Sequence[dict[str, str]]) -> str:
    """The command of each run."""
    once = {line["row"]: line for line in lines}.values()
    # Older runs had no patience in updates.
    body = "".join(
        f"    $R {line['arguments']}{' --stopping_updates=0' * (line['source'] == 'csv')}\n"
        for line in once
    )
    return f'\n    R="python run_recbole_simdiff.py --dataset=amazon-beauty"\n{body}\n'


def cited() -> dict[str, dict[str, str]]:
    """What SimDiffRec's Table 2 says of amazon-beauty: row -> metric -> value."""
    text = (ROOT / "properties" / "experiment" / "table2.yaml").read_text()
    (source,) = yaml.safe_load(text)["cited"]
    return {
        row: dict(zip(source["metrics"], map(str, values), strict=True))
        for row, values in source["values"]["amazon-beauty"].items()
    }


def checked() -> str:
    """How many published rows contradict themselves, and which, with the reason."""
    table2 = ROOT / "properties" / "experiment" / "table2.yaml"
    sources = yaml.safe_load(table2.read_text())["cited"]
    sources += yaml.safe_load((HERE / "published.yaml").read_text())
    counts, found = [], []
    for source in sources:
        faults = [
            (source["source"], dataset, row, fault)
            for dataset, values in source["values"].items()
            for row, numbers in values.items()
            for fault in impossible(dict(zip(source["metrics"], numbers, strict=True)), 1e-4)
        ]
        rows = sum(map(len, source["values"].values()))
        counts.append((source["source"], str(rows), str(len({fault[1:3] for fault in faults}))))
        found += faults
    first = table(iter((("source", "rows checked", "impossible"), *counts)))
    second = table(iter((("source", "data set", "row", "contradiction"), *found)), "---")
    return f"\n{first}\n{second}\n"


def table(rows: Iterator[Sequence[str]], rule: str = "---:") -> str:
    """Markdown of a heading and rows; the rule aligns all columns but the first."""
    head, *body = rows
    rules = ["---"] + [rule] * (len(head) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rules, *body))


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
