"""A model card: what a checkpoint was trained on, how it was measured, and what it cannot do."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.config.config import Config
from recbole_simdiff.config.keys import NOT_IN_RESULT, UNREAD
from recbole_simdiff.data.statistics import Statistics
from recbole_simdiff.evaluation.protocols import Metrics
from recbole_simdiff.runs.restore import stored_config
from recbole_simdiff.runs.result import RESULT, read_result
from recbole_simdiff.runs.stored import load_run

# Settings that name files of the machine: their last part is shown alone.
_FILES = ("baseline_checkpoint", "epochs_from", "init_from", "item_table", "item_vectors")

# What the Hub reads.
_HUB = """\
---
library_name: recbole_simdiff
tags: [recommendation, sequential-recommendation]
---"""


def card(place: str | Path, without_users: bool = False) -> str:
    """The model card of a checkpoint, as Markdown.

    It names no folder of the machine. Metrics of the test are those of the ``result.json`` beside
    the checkpoint, where there is one.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        without_users (bool): the card is for a copy of it without users.

    Raises:
        UserError: if the checkpoint cannot be used.
    """
    path = checkpoint.resolve(place, BEST)
    _, content = load_run(path)
    stored = content["config"]
    config = _config(content)
    stripped = without_users or "n_users" in content
    parts = [
        _HUB,
        f"# {stored['model']} on {stored['dataset']}",
        "A model of the next item in a user's history. It ranks the items of its data set.",
        "## Data",
        _data(content),
        "## Protocol",
        _protocol(config),
        "## Metrics",
        _metrics(path, content),
        "## Settings",
        _settings(stored["values"]),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(config, content, stripped)),
    ]
    return "\n\n".join(parts) + "\n"


def _config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings with their defaults where the checkpoint's version had none."""
    values: dict[str, Any] = content["config"]["values"]
    if "own_model" in content:  # whose code need not be there
        return values
    config: Config = stored_config(content, {}, ())
    return {**config.plain()["values"], "held_out": config.held_out}


def _data(content: Mapping[str, Any]) -> str:
    known = {field.name for field in fields(Statistics)}
    counts = Statistics(**{k: v for k, v in content["statistics"].items() if k in known})
    return f"{content['config']['dataset']}: {counts}. Histories are in order of time."


def _protocol(config: Mapping[str, Any]) -> str:
    args = config["eval_args"]
    lines = [
        f"- split: `{json.dumps(args['split'])}`, grouped by {args['group_by']}, in order of time",
        f"- candidates: `{json.dumps(args['mode'])}`",
        f"- the best epoch has the best {config['valid_metric']} on validation; the test is read "
        "once, after training",
        "- history kept: earlier items of the user stay in the ranking; history removed: they do "
        "not",
    ]
    return "\n".join(lines)


def _metrics(path: Path, content: Mapping[str, Any]) -> str:
    """A table of both splits and protocols, or what the checkpoint alone knows."""
    splits: dict[str, Mapping[str, Metrics]] = {}
    digits = int(content["config"]["values"].get("metric_decimal_place", 4))
    if (path.parent / RESULT).is_file() and path.name == BEST:
        result = read_result(path.parent)
        splits = {"validation": result.valid, "test": result.test}
    elif content["progress"]["best_result"]:
        splits = {"validation": {"history kept": content["progress"]["best_result"]}}
    rows = [
        (split, protocol.replace("_", " "), metrics)
        for split, protocols in splits.items()
        for protocol, metrics in protocols.items()
    ]
    if not rows:
        return "None: everything was trained on, and nothing was held out."
    names = list(rows[0][2])
    lines = [f"| split | protocol | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for split, protocol, metrics in rows:
        cells = (f"{metrics[name]:.{digits}f}" for name in names)
        lines.append(f"| {split} | {protocol} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(values: Mapping[str, Any]) -> str:
    lines = []
    for key, value in sorted(values.items()):
        if value is None or key in NOT_IN_RESULT or key in UNREAD:
            continue
        shown = Path(str(value)).name if key in _FILES else value
        lines.append(f"{key}: {json.dumps(shown, ensure_ascii=False)}")
    return "```yaml\n{}\n```".format("\n".join(lines))


def _limits(config: Mapping[str, Any], content: Mapping[str, Any], stripped: bool) -> Iterator[str]:
    n_items = len(content["items"]) - 1
    yield f"It knows {n_items:,} items. Others in a history are left out, and never recommended."
    yield f"It reads the newest {config['MAX_ITEM_LIST_LENGTH']} items of a history."
    if "LS" in config["eval_args"]["split"]:
        yield (
            "Each user's last items are held out, so training has seen events of other users that "
            "are later than a tested one; a split by time gives lower figures."
        )
    yield f"One training with seed {config['seed']}; another seed gives other figures."
    if stripped:
        yield "It holds no users and histories, and can be neither resumed nor evaluated."
    else:
        yield "It holds ids and histories of users. `checkpoint strip` writes one without."
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    yield f"Made with {versions}."
