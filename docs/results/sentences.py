"""The sentences of README.md and docs/results.md that name figures, made from the records.

``tests/test_docs_sentences.py`` compares the pages with them, whatever their line breaks. Where a
figure has changed, it shows the sentence as it is now; where an order is reversed, the sentence has
to be written anew, here and on the page.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from records import RUNS, Row, rows
from render import ROOT, cited, digits

from recbole_simdiff.evaluation.protocols import KEPT, REMOVED

ENCODER = "SASRec with full softmax"
SMALL_BATCHES = f"{ENCODER}, batches of 44 rows"
PREFIX = f"{ENCODER}, `prefix_last`"
BCE = "SASRec with BCE"
CADIREC = "CaDiRec with full softmax"
DIFFUASR = f"DiffuASR on {ENCODER}"
EVERY = "SimDiffRec, contrast at every state"
DOT = "SimDiffRec, contrast by dot product, `prefix_last`"
CONTRASTIVE = ("CL4SRec", "DuoRec", "MCLRec", "ECLSR")

# What no record of this folder holds -> where it is from.
UNRECORDED = {
    "(HR@10 / NDCG@10: DuoRec .0845 / .0443, MCLRec .0871 / .0446)": "the papers",
    "a validation NDCG@10 of 0.015 after 4 epochs, the encoder 0.041": "logs of older runs",
    "(NDCG@10 .0378 against .0369)": "the log of an older run",
    "(mean cosine 0.047 against 0.037)": "the log of an older run",
    "falls from 8 to 0.3": "the log of an older run",
    "is 0.003546 with a standard deviation of 0.000007": "the log of an older run",
}


def pages() -> dict[Path, list[str]]:
    """Page -> its sentences, or the parts of them that have figures, in order."""
    found = rows()
    return {
        ROOT / "README.md": readme(found),
        ROOT / "docs" / "results.md": [
            data(),
            *contrastive(found),
            *simdiffrec(found),
            *cadirec(found),
            *others(found),
        ],
    }


def readme(found: Mapping[str, Row]) -> list[str]:
    """What diffusion buys, after the table."""
    gains = sorted(gain(found[model], found[PREFIX]) for model in CONTRASTIVE)
    return [
        f"CaDiRec with the full softmax is {gain(found[CADIREC], found[SMALL_BATCHES])} % of "
        "NDCG@10 above it",
        f"the contrastive models without diffusion gain {gains[0]} to {gains[-1]} %.",
    ]


def data() -> str:
    """Size of the data set."""
    record = json.loads((RUNS / "amazon-beauty-pop.json").read_text())
    counts = record["statistics"]
    return f"{counts['users']:,} users, {counts['items']:,} items, {counts['actions']:,} actions."


def contrastive(found: Mapping[str, Row]) -> list[str]:
    """The four models without diffusion beside the encoder of the same rows."""
    encoder = found[PREFIX]
    kept = [gain(found[m], encoder, split) for m in CONTRASTIVE for split in ("valid", "test")]
    removed = sorted(found[m].mean("valid", REMOVED, "ndcg@10") for m in CONTRASTIVE)
    beating = [gain(found[m], encoder, "test", REMOVED) for m in CONTRASTIVE if m != "DuoRec"]
    return [
        "All four beat the encoder in validation and in test, by "
        f"{min(kept)} to {max(kept)} % of NDCG@10.",
        f"All four beat it in validation ({digit3(removed[0])} to {digit3(removed[-1])} against "
        f"{digit3(encoder.mean('valid', REMOVED, 'ndcg@10'))}). In the test CL4SRec, MCLRec and "
        f"ECL-SR do, by {min(beating)} to {max(beating)} %; DuoRec does not "
        f"({figure(found['DuoRec'], 'test', REMOVED)} against {figure(encoder, 'test', REMOVED)}).",
    ]


def simdiffrec(found: Mapping[str, Row]) -> list[str]:
    """SimDiffRec with a contrast, and what its denoiser gives back in the end."""
    logs = [run.log[-1]["monitor"] for row in (EVERY, DOT) for run in found[row].runs]
    (share,) = {round(100 * log["restored_selected"]) for log in logs}
    every, dot, prefix = (found[row] for row in (EVERY, DOT, PREFIX))
    encoder = of_seeds(found[SMALL_BATCHES], every)
    return [
        f"at every state of whole histories {figure(every, 'valid')} in validation and "
        f"{figure(every)} in the test (encoder {figure(encoder, 'valid')}, {figure(encoder)}), on "
        f"`prefix_last` {figure(dot, 'valid')} and {figure(dot)} (encoder "
        f"{figure(prefix, 'valid')}, {figure(prefix)}).",
        f"gives back the original item at {share} % of the selected positions",
    ]


def cadirec(found: Mapping[str, Row]) -> list[str]:
    """CaDiRec with the full softmax and with one negative, each beside its encoder."""
    ours, encoder, released, bce = (found[row] for row in (CADIREC, SMALL_BATCHES, "CaDiRec", BCE))
    monitor = ours.runs[0].log[-1]["monitor"]
    paper = " / ".join(digits(cited()["CaDiRec"][m])[1:] for m in ("hit@10", "ndcg@10"))
    return [
        f"history kept {figure(ours, 'valid')} against {figure(encoder, 'valid')} in validation, "
        f"{figure(ours)} against {figure(encoder)} in the test; history removed "
        f"{figure(ours, 'test', REMOVED)} against {figure(encoder, 'test', REMOVED)} in the test.",
        "finds a replaced item among its three first in "
        f"{round(100 * monitor['in_candidates'])} % of the cases, and "
        f"{round(100 * monitor['untouched_views'])} % of the views have no replaced item.",
        f"Paper: HR@10 / NDCG@10 {paper}, here {hit_rate(ours)} / {figure(ours)}.",
        f"CaDiRec is {side(released, bce, 'valid')} of NDCG@10 in validation and "
        f"{by(released, bce)} in the test, and {side(released, bce, metric='hit@10')} in the "
        "test's HR@10.",
        f"It is {side(released, bce, 'valid', REMOVED)} in both (test: "
        f"{figure(released, 'test', REMOVED)} against {figure(bce, 'test', REMOVED)}), and "
        f"{by(released, bce, 'test', REMOVED, 'hit@10')} in HR@10.",
    ]


def others(found: Mapping[str, Row]) -> list[str]:
    """DiffuASR beside its backbone; the row that was published of SASRec."""
    ours, encoder = found[DIFFUASR], found[ENCODER]
    options = dict(word[2:].split("=") for word in ours.runs[-1].arguments.split())
    defaults = yaml.safe_load((ROOT / "properties" / "model" / "DiffuASR.yaml").read_text())
    paper, published = (
        " / ".join(digits(cited()[row][m])[1:] for m in ("hit@10", "ndcg@10"))
        for row in ("DiffuASR", "SASRec")
    )
    return [
        f"It is {side(ours, encoder, 'valid')} of NDCG@10 in validation and "
        f"{by(ours, encoder)} in the test, and {side(ours, encoder, metric='hit@10')} in HR@10.",
        f"It is {side(ours, encoder, 'valid', REMOVED)} in validation and "
        f"{side(ours, encoder, 'test', REMOVED)} in the test "
        f"({figure(ours, 'test', REMOVED)} against {figure(encoder, 'test', REMOVED)}).",
        f"trained for {options['diffuasr_epochs']} of up to {defaults['diffuasr_epochs']} epochs",
        f"HR@10 / NDCG@10 {paper}, backbone not stated.",
        f"{published} (HR@10 / NDCG@10) is near SASRec with BCE.",
    ]


def of_seeds(row: Row, other: Row) -> Row:
    """The row's runs of the seeds that another row has."""
    seeds = {run.seed for run in other.runs}
    return replace(row, runs=[run for run in row.runs if run.seed in seeds])


def figure(row: Row, split: str = "test", protocol: str = KEPT, metric: str = "ndcg@10") -> str:
    """NDCG@10 with four digits and no zero before them."""
    return f"{row.mean(split, protocol, metric):.4f}"[1:]


def hit_rate(row: Row) -> str:
    """HR@10 of the test likewise."""
    return figure(row, metric="hit@10")


def digit3(value: float) -> str:
    """Three digits and no zero before them."""
    return f"{value:.3f}"[1:]


def gain(
    row: Row, other: Row, split: str = "test", protocol: str = KEPT, metric: str = "ndcg@10"
) -> int:
    """How far a row is above another, in whole per cent of the other's mean."""
    ours, theirs = (r.mean(split, protocol, metric) for r in (row, other))
    return round(100 * (ours / theirs - 1))


def side(row: Row, other: Row, *of: str, metric: str = "ndcg@10") -> str:
    """``ahead by 3 %`` or ``behind by 1 %``; see ``gain``."""
    per_cent = gain(row, other, *of, metric=metric)
    return f"{'ahead' if per_cent > 0 else 'behind'} by {abs(per_cent)} %"


def by(row: Row, other: Row, *of: str) -> str:
    """``by 2 %`` of a row that is ahead; the whole text where it is not."""
    per_cent = gain(row, other, *of)
    return f"by {per_cent} %" if per_cent > 0 else f"behind by {-per_cent} %"


def plain(text: str | Sequence[str]) -> str:
    """Text without its line breaks."""
    return " ".join(str(text).split())
