"""Draw the figures of the documentation.

    python docs/figures/draw.py

``method.svg`` and ``dataflow.svg`` are drawings; ``curves.svg`` shows the records of the runs in
``docs/results/runs/`` that have a curve.
"""

import json
from itertools import pairwise
from pathlib import Path

from svg import COLOURS, Drawing

HERE = Path(__file__).parent
RUNS = HERE.parent / "results" / "runs"
METRIC = "ndcg@10"
DASHES = ("", "7 3", "2 3")  # of the curves, so that colour alone says nothing
EPOCHS = 10  # fewer are no curve


def main() -> None:
    """Write every figure."""
    for name, drawing in figures().items():
        (HERE / name).write_text(drawing)


def figures() -> dict[str, str]:
    """Name of each file -> its content."""
    return {
        "method.svg": str(method()),
        "dataflow.svg": str(data_flow()),
        "curves.svg": str(curves()),
    }


def method() -> Drawing:
    """SimDiffRec from a sequence to its three losses."""
    d = Drawing(900, 452, "SimDiffRec: how a sequence becomes two views and three losses")
    d.text(20, 34, "sequence s", "ink bold")
    d.cells(20, 46, "abcde")
    d.box(
        222,
        22,
        180,
        ["similarity noise", "blend each item with the mean", "of its k nearest (Eq. 6-9)"],
    )
    d.box(444, 22, 180, ["denoiser", "bidirectional Transformer", "restores the items (Eq. 10-12)"])
    d.box(666, 22, 214, ["confidence", "largest probability of each", "position (Eq. 14-16)"])
    for x in (182, 402, 624):
        d.arrow((x, 59), (x + (40 if x == 182 else 42), 59))
    d.arrow((534, 87), (534, 116))
    d.box(444, 116, 180, ["diffusion loss (Eq. 13)"])
    d.text(666, 126, "most confident positions:", "soft small")
    d.text(666, 142, "overwritten with choices of the denoiser", "soft small")
    d.text(444, 188, "positive view s+: first choice", "ink bold")
    d.cells(444, 198, ["a", "b'", "c", "d'", "e"], (1, 3))
    d.text(666, 188, "hard negative s-: k-th choice", "ink bold")
    d.cells(666, 198, ["a", 'b"', "c", 'd"', "e"], (1, 3))
    d.arrow((874, 87), (874, 160), (764, 160), (764, 174))
    d.arrow((764, 160), (534, 160), (534, 174))
    d.box(20, 262, 860, ["encoder: causal Transformer, the same for all three"], 36)
    for x, y in ((100, 72), (524, 224), (746, 224)):
        d.arrow((x, y), (x, 262))
    for x, name in ((100, "h"), (524, "h+"), (746, "h-")):
        d.arrow((x, 298), (x, 348))
        d.text(x + 8, 326, name, "ink bold")
    d.box(20, 348, 240, ["next-item loss (Eq. 3)", "full softmax over all items"])
    d.box(
        300,
        348,
        580,
        [
            "contrastive loss, InfoNCE (Eq. 17)",
            "h near h+, far from h- and from the views of other rows",
        ],
    )
    d.arrow((100, 340), (400, 340), (400, 348))
    d.text(
        450,
        432,
        "total (Eq. 18) = next-item + cl_weight x contrastive + diff_weight x diffusion",
        "ink",
        "middle",
    )
    return d


def data_flow() -> Drawing:
    """From a file of interactions to recommendations."""
    d = Drawing(900, 340, "From a file of interactions to training, evaluation and recommendations")
    rows = (
        (
            "train",
            ("name.inter", "RecBole atomic file"),
            ("FlatDataset", "RecBole's ids, filters, split;", "exact time order"),
            ("BucketLoader", "rows of similar length,", "trimmed to the longest"),
            ("calculate_loss", "named terms,", "each weighted"),
            ("PlanTrainer", "one backward; phases,", "exact resume"),
        ),
        (
            "evaluate",
            (),
            ("full-sort loader", "RecBole's, of validation", "and test"),
            ("full_sort_predict", "scores", "[rows, items]"),
            ("metrics", "history kept and history", "removed, one pass"),
            ("best epoch", "by validation;", "tested once"),
        ),
        (
            "use",
            ("load(run)", "ids, configuration, weights"),
            ("recommend", "in your own item ids"),
            ("evaluate, replay", "the same figures again"),
            ("serve, export", "HTTP, vectors, ONNX"),
            ("best.safetensors", "tensors and JSON only"),
        ),
    )
    xs, width = (68, 234, 400, 566, 732), 150
    for number, (name, *boxes) in enumerate(rows):
        y = 20 + 106 * number
        d.text(14, y + 42, name, "ink bold")
        for x, lines in zip(xs, boxes, strict=True):
            if lines:
                d.box(x, y, width, lines, 72)
        for left, right in pairwise(xs):
            if number == 0 or (number == 1 and left > 68):
                d.arrow((left + width, y + 36), (right, y + 36))
    d.arrow((309, 92), (309, 126))
    d.arrow((807, 92), (807, 126))
    d.arrow((807, 198), (807, 232))
    for x in (143, 309, 475, 641):
        d.arrow((807, 304), (807, 320), (x, 320), (x, 304))
    return d


def curves() -> Drawing:
    """Validation NDCG@10 by epoch of every recorded run that has a curve."""
    series = recorded()
    d = Drawing(900, max(400, 90 + 56 * len(series)), "Validation NDCG@10 by epoch")
    d.text(20, 28, "Validation NDCG@10 by epoch (history kept, amazon-beauty)", "ink bold")
    last = max(len(values) for values in series.values())
    top = max(max(values) for values in series.values()) * 1.08
    left, right, low, high = 70, 610, 350, 50

    def point(epoch: int, value: float) -> tuple[float, float]:
        return left + (right - left) * epoch / last, low - (low - high) * value / top

    for hundredths in range(int(top * 100) + 1):
        _, y = point(0, hundredths / 100)
        d.line([(left, y), (right, y)], "grid")
        d.text(left - 8, y + 4, f"{hundredths / 100:.2f}", "soft small", "end")
    for epoch in range(0, last + 1, 20):
        d.text(point(epoch, 0)[0], low + 18, str(epoch), "soft small", "middle")
    d.text((left + right) / 2, low + 38, "epoch", "soft", "middle")
    for number, (name, values) in enumerate(series.items()):
        colour, dashes = number % COLOURS, DASHES[number % len(DASHES)]
        d.line([point(*pair) for pair in enumerate(values)], f"s{colour}", dashes)
        best = max(range(len(values)), key=values.__getitem__)
        model, _, variant = name.partition(", ")
        y = 72 + 56 * number
        d.line([(630, y - 4), (658, y - 4)], f"s{colour}", dashes)
        d.text(666, y, model, f"t{colour} bold")
        d.text(666, y + 17, variant, "soft small")
        d.text(666, y + 33, f"best {values[best]:.4f}, epoch {best}", "soft small")
    return d


def recorded() -> dict[str, list[float]]:
    """Row with a curve -> validation metric by epoch of its smallest seed, in table order."""
    found: dict[str, list[float]] = {}
    records = [json.loads(path.read_text()) for path in RUNS.glob("*.json")]
    for record in sorted(records, key=lambda r: r["config"]["values"]["seed"], reverse=True):
        values = [epoch["valid"][METRIC] for epoch in record["log"] if epoch["valid"]]
        if len(values) >= EPOCHS:
            found[record["row"]] = values
    lines = (RUNS.parent / "rows.txt").read_text().splitlines()
    order = (line.partition(" | ")[0] for line in lines)
    return {row.replace("`", ""): found[row] for row in order if row in found}


if __name__ == "__main__":
    main()
