"""Write the tables of README.md and of the pages in docs/ from the files of this folder.

    python docs/results/render.py

``records.py`` says where the records of the runs are. ``speed.txt`` is what ``python -m
tests.benchmarks`` printed, ``short.txt`` what it prints with ``--short``, ``make-run.txt`` the last
lines of ``make run``. What is published is read from ``properties/experiment/table2.yaml`` and, of
other papers, from ``published.yaml``.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from records import Row, Run, load_ranks, rows

from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS
from recbole_simdiff.experiments.results import (
    Comparison,
    holm,
    impossible,
    interval,
    metric_of_rank,
    paired_p,
    signed_rank_p,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20")
COMPARED = ("hit@10", "ndcg@10")
NAMES = {"hit": "HR", "ndcg": "NDCG"}


def main() -> None:
    """Put every table in its place, between two comments that name it."""
    for page, tables in pages().items():
        page.write_text(filled(page.read_text(), tables))


def pages() -> dict[Path, dict[str, str]]:
    """Page -> name of a table -> its Markdown."""
    lines = list(rows().values())
    details = {
        f"{split}, {protocol}": table(detail_rows(lines, split, protocol))
        for split in ("test", "valid")
        for protocol in PROTOCOLS
    }
    details |= {"cost": table(cost_rows(lines)), "comparisons": compared(lines)}
    # In fences: after a list, indented lines are part of its last item.
    speed, short, made = (
        f"```text\n{(HERE / f'{name}.txt').read_text().rstrip()}\n```\n"
        for name in ("speed", "short", "make-run")
    )
    return {
        ROOT / "README.md": {
            "overview": table(overview_rows(lines)),
            "fast": fast(),
            "make run": made,
        },
        ROOT / "docs" / "results.md": details | {"commands": commands(lines)},
        ROOT / "docs" / "measured.md": {"speed": speed, "short": short},
        ROOT / "docs" / "impossible.md": {"impossible": checked()},
    }


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


def overview_rows(lines: Sequence[Row]) -> Iterator[Sequence[str]]:
    """Test metrics of each row, history kept, beside the published ones of its model."""
    shown = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")
    yield "model", *map(heading, shown), "valid. NDCG@10", "best epoch", "published HR@10 / NDCG@10"
    published = cited()
    for row in lines:
        found = published.get(row.label)
        yield (
            row.title,
            *(value(row, "test", KEPT, name) for name in shown),
            value(row, "valid", KEPT, "ndcg@10"),
            epochs(row),
            f"{digits(found['hit@10'])} / {digits(found['ndcg@10'])}" if found else "",
        )


def detail_rows(lines: Sequence[Row], split: str, protocol: str) -> Iterator[Sequence[str]]:
    """Every metric of one split under one protocol."""
    yield "model", *map(heading, METRICS), "best epoch"
    for row in lines:
        yield row.title, *(value(row, split, protocol, name) for name in METRICS), epochs(row)


def cost_rows(lines: Sequence[Row]) -> Iterator[Sequence[str]]:
    """What each row with a log cost: an epoch, the way to the best one, and the whole."""
    yield "model", "s an epoch", "updates to the best epoch", "updates in all", "h in all"
    for row in lines:
        runs = [run for run in row.runs if run.log]
        if runs:
            yield (
                row.title,
                spread([run.seconds_per_epoch for run in runs], ".1f"),
                spread([run.updates_to_best for run in runs], ",.0f"),
                spread([run.log[-1]["updates"] for run in runs], ",.0f"),
                spread([sum(e["seconds"] for e in run.log) / 3600 for run in runs], ".2f"),
            )


def compared(lines: Sequence[Row]) -> str:
    """Each row with stored ranks against its encoder, under both protocols."""
    by_label = {row.label: row for row in lines}
    found: list[Comparison] = []
    for protocol in PROTOCOLS:
        for metric in COMPARED:
            family = [
                comparison
                for row in lines
                if row.against in by_label
                and (comparison := compare(row, by_label[row.against], protocol, metric))
            ]
            p_users, p_ranks = (
                holm([getattr(one, name) for one in family]) for name in ("p_users", "p_wilcoxon")
            )
            found += [
                replace(one, p_users=u, p_wilcoxon=w)
                for one, u, w in zip(family, p_users, p_ranks, strict=True)
            ]
    if not found:
        return "No row and its encoder both have the ranks of their users stored so far.\n"
    head = ("model", "against", "protocol", "metric", "seeds", "difference", "%", "95 % interval")
    body = (
        (
            one.row,
            one.against,
            one.protocol,
            heading(one.metric),
            str(one.seeds),
            f"{one.difference:+.4f}",
            f"{100 * one.relative:+.1f}",
            f"{one.low:+.4f} to {one.high:+.4f}",
            *map(probability, (one.p_wilcoxon, one.p_users, one.p_seeds)),
        )
        for one in found
    )
    return table(iter(((*head, "p, Wilcoxon", "p, users", "p, seeds"), *body)))


def compare(row: Row, encoder: Row, protocol: str, metric: str) -> Comparison | None:
    """A row against its encoder, user by user; None without a seed whose ranks both have.

    Raises:
        ValueError: if the ranks are of other users or targets.
    """
    pairs = [
        (ours, theirs)
        for ours in row.runs
        for theirs in encoder.runs
        if ours.seed == theirs.seed and ours.ranks.is_file() and theirs.ranks.is_file()
    ]
    if not pairs:
        return None
    differences = np.mean([by_user(*pair, protocol, metric) for pair in pairs], axis=0)
    values = [
        [run.metrics["test", protocol][metric] for run in runs] for runs in zip(*pairs, strict=True)
    ]
    ours, theirs = map(statistics.fmean, values)
    low, high = interval(differences)
    return Comparison(
        row=row.label,
        against=encoder.label,
        dataset="amazon-beauty",
        metric=metric,
        protocol=protocol,
        difference=ours - theirs,
        relative=(ours - theirs) / theirs,
        p_seeds=paired_p([a - b for a, b in zip(*values, strict=True)]),
        p_users=paired_p(differences),
        effect=float(differences.mean() / differences.std(ddof=1)),
        low=low,
        high=high,
        seeds=len(pairs),
        users=len(differences),
        p_wilcoxon=signed_rank_p(differences),
    )


def by_user(ours: Run, theirs: Run, protocol: str, metric: str) -> NDArray[np.float64]:
    """Difference of the metric for each user, [users]."""
    one, other = load_ranks(ours.ranks), load_ranks(theirs.ranks)
    if one["users"] != other["users"]:
        raise ValueError(f"{ours.name} and {theirs.name} rank for other users or targets")
    name = protocol.removeprefix("history ")
    return metric_of_rank(one[name], metric) - metric_of_rank(other[name], metric)


def commands(lines: Sequence[Row]) -> str:
    """The command of each row."""
    body = ""
    for row in lines:
        run = row.runs[-1]
        older = "" if run.name else " --stopping_updates=0"  # they had no patience in updates
        seeds = f"  # --seed={', '.join(str(r.seed) for r in row.runs)}" * (len(row.runs) > 1)
        body += f"    $R {run.arguments}{older}{seeds}\n"
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


def value(row: Row, split: str, protocol: str, metric: str) -> str:
    """A metric of a row with four digits; of several runs mean and standard deviation."""
    return spread(row.values(split, protocol, metric), ".4f")


def spread(values: Sequence[float], form: str) -> str:
    """A number, or mean and standard deviation (of a sample) of several."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"


def epochs(row: Row) -> str:
    """Best epoch of each run, counted from 0, of how many; + where it was stopped by hand."""
    return ", ".join(
        f"{run.best_epoch} of {run.epochs}" + "+" * (run.ended == "by hand") for run in row.runs
    )


def probability(p: float) -> str:
    """A p value with three digits; a dash where there is none."""
    return "-" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def heading(metric: str) -> str:
    """``hit@10`` as tables write it."""
    name, _, k = metric.partition("@")
    return f"{NAMES[name]}@{k}"


def digits(text: str) -> str:
    """Four digits."""
    return f"{float(text):.4f}"


if __name__ == "__main__":
    main()
