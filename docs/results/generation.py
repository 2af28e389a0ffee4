"""How a trained DreamRec is best sampled: guidance, noise and steps, changed at evaluation only.

    python docs/results/generation.py saved/<run> <name> --data_path=<folder>

Evaluates the run's best epoch on the validation part, history kept, for every setting below: with
Gaussian numbers of five sampling seeds, and with all of them at their mean. Writes <name>.csv with
every metric of every evaluation, <name>.md, and the figure as <name>.pdf, .svg and .png.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Iterator
from pathlib import Path

from recbole_simdiff import files
from recbole_simdiff.evaluation.protocols import kept
from recbole_simdiff.experiments.plots import pyplot, save
from recbole_simdiff.runs.restore import evaluate
from recbole_simdiff.runs.result import read_result

GUIDANCE = (0.0, 1.0, 2.0, 4.0, 8.0)
STEPS = (1, 2, 5, 10, 20, 50)
SEEDS = 5
COLUMNS = ("swept", "value", "noise", "seed")


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("name", type=Path)
    parser.add_argument("--data_path")
    given = parser.parse_args(arguments)
    place = {"data_path": given.data_path} if given.data_path else {}
    values = read_result(Path(given.run)).config["values"]
    metric = values["valid_metric"].lower()
    rows = []
    for row, changes in settings(values["sampling_seed"], values["diffusion_steps"]):
        result = evaluate(given.run, place | changes | {"sampling_seeds": 1}, test=False)
        rows.append(row | kept(result.valid))
        print(*row.values(), f"{metric} {rows[-1][metric]:.4f}", flush=True)
    write(given.name.with_suffix(".csv"), as_csv(rows))
    write(given.name.with_suffix(".md"), as_markdown(rows, metric))
    draw(rows, metric, given.name)


def settings(seed: int, n_steps: int) -> Iterator[tuple[dict, dict]]:
    """What a row says, and the keys that are changed for it.

    Args:
        seed (int): the first sampling seed.
        n_steps (int): T; sampler ddim takes no more steps.
    """
    sweeps = [("guidance", value, {"guidance": value}) for value in GUIDANCE]
    sweeps += [
        ("sample_steps", value, {"sampler": "ddim", "sample_steps": value})
        for value in STEPS
        if value <= n_steps
    ]
    for swept, value, changes in sweeps:
        for noise in (False, True):
            for number in range(seed, seed + (SEEDS if noise else 1)):
                row = dict(
                    zip(COLUMNS, (swept, value, noise, number if noise else ""), strict=True)
                )
                yield row, changes | {"sample_noise": noise, "sampling_seed": number}


def summary(rows: list[dict], swept: str, noise: bool, metric: str) -> list[tuple]:
    """Value, mean and standard deviation over the seeds of each value of one sweep."""
    found: dict = {}
    for row in rows:
        if (row["swept"], row["noise"]) == (swept, noise):
            found.setdefault(row["value"], []).append(row[metric])
    return [
        (value, statistics.mean(of), statistics.stdev(of) if len(of) > 1 else 0.0)
        for value, of in found.items()
    ]


def as_csv(rows: list[dict]) -> str:
    """Every digit of every evaluation."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[dict], metric: str) -> str:
    """A table: mean and standard deviation with noise, and the value without."""
    lines = [f"| | {metric}, noise, {SEEDS} seeds | {metric}, no noise |", "| --- | ---: | ---: |"]
    for swept in ("guidance", "sample_steps"):
        noisy, mean = (summary(rows, swept, noise, metric) for noise in (True, False))
        for (value, average, spread), (_, without, _) in zip(noisy, mean, strict=True):
            cells = f"{average:.4f} ± {spread:.5f} | {without:.4f}"
            lines.append(f"| {swept} {value:g} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], metric: str, name: Path) -> None:
    """One panel a sweep; the bars are one standard deviation to each side of the mean."""
    figure, panels = pyplot().subplots(1, 2, figsize=(7, 2.8), sharey=True)
    for panel, swept in zip(panels, ("guidance", "sample_steps"), strict=True):
        for noise, label in ((True, f"noise, {SEEDS} seeds"), (False, "no noise")):
            value, mean, spread = zip(*summary(rows, swept, noise, metric), strict=True)
            panel.errorbar(value, mean, yerr=spread, marker="o", capsize=2, label=label)
        panel.set_xlabel(swept if swept == "guidance" else "steps of the DDIM sampler")
        panel.legend()
    panels[1].set_xscale("log")
    panels[0].set_ylabel(f"validation {metric}")
    save(figure, name)


def write(path: Path, text: str) -> None:
    """Write a text file, at once or not at all."""
    files.write_atomically(path, lambda name: Path(name).write_text(text))


if __name__ == "__main__":
    main()
