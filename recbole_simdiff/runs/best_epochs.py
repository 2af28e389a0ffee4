"""For how many epochs a former run found each phase best to be trained (``epochs_from``)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.modules.plan import Phase
from recbole_simdiff.runs.result import RESULT, RunResult, read_result

Scores = dict[str, list[float | None]]  # phase -> validation score of each epoch, if it had one


def asks_for_epochs(config: Config) -> bool:
    """Whether ``epochs_from`` names a run to be read; where a checkpoint gave it, it does not."""
    return config["epochs_from"] is not None and not config.is_stored("epochs_from")


def epoch_scores(config: Config) -> dict[str, Scores]:
    """What the run that ``epochs_from`` names adds to the name of a result, or nothing.

    Raises:
        UserError: if it cannot be used.
    """
    return {"epochs_from": _validated(config)[1]} if asks_for_epochs(config) else {}


def best_epochs(config: Config, phases: Sequence[Phase]) -> dict[str, int]:
    """Phase -> epochs to train it for, as ``epochs_from`` says; empty without it.

    A phase whose best weights went on, or were the result, is trained up to its best epoch; one
    whose last weights went on, as long as it was.

    Args:
        config (Config): resolved configuration.
        phases (Sequence): of its model.

    Raises:
        UserError: if the run cannot be used, or a phase whose best weights went on was never
            validated.
    """
    if not asks_for_epochs(config):
        return {}
    result, scores = _validated(config)
    if scores.keys() != {phase.name for phase in phases}:
        raise _unusable(
            config,
            f"its phases are {', '.join(scores)}, here they are "
            f"{', '.join(phase.name for phase in phases)}",
        )
    bigger, found = bool(result.config["values"]["valid_metric_bigger"]), {}
    to_beat: float | None = None
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        to_beat = to_beat if phase.refine else None  # as in training, see ``Progress``
        n_best = 0
        for epoch, score in enumerate(scores[phase.name], start=1):
            gain = 0.0 if score is None or to_beat is None else score - to_beat
            if score is not None and (to_beat is None or (gain if bigger else -gain) > 0):
                to_beat, n_best = score, epoch
        best_went_on = phase.evaluate and (following is None or following.refine)
        if best_went_on and to_beat is None:
            raise _unusable(
                config,
                f"its phase {phase.name} was never validated (epochs={len(scores[phase.name])}, "
                f"eval_step={result.config['values'].get('eval_step')}), so none of its epochs was "
                "found best",
            )
        found[phase.name] = n_best if best_went_on else len(scores[phase.name])
    return found


def check_validated(config: Config, phases: Sequence[Phase]) -> None:
    """Refuse a plan whose best weights would be asked for before a validation has chosen them.

    Args:
        config (Config): resolved configuration of a run with a validation part.
        phases (Sequence): of its model.

    Raises:
        UserError: if a phase ends before its first validation.
    """
    every, chosen = min(config["eval_step"], config["epochs"]), False
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        chosen = (chosen and phase.refine) or not phase.evaluate or phase.epochs >= every
        if not chosen and (following is None or following.refine):
            raise UserError(
                f"eval_step={config['eval_step']}: phase {phase.name} of model={config.name} has "
                f"{phase.epochs} epochs and would never be validated, but its best epoch is to go "
                f"on; give eval_step={phase.epochs} or less",
                keys=("eval_step",),
            )


def _validated(config: Config) -> tuple[RunResult, Scores]:
    """A finished run, and the validation scores of its epochs."""
    place = Path(config["epochs_from"])
    result = read_result(place if place.is_dir() else place.parent)
    if result.config["model"] != config.name:
        raise _unusable(config, f"it is a run of model={result.config['model']}, not {config.name}")
    log = json.loads((Path(result.run_dir) / RESULT).read_text()).get("log", [])
    metric = str(result.config["values"]["valid_metric"]).lower()
    scores: Scores = {}
    for entry in log:
        scores.setdefault(entry["phase"], []).append(_score(entry, metric))
    if all(score is None for values in scores.values() for score in values):
        raise _unusable(config, "it was not validated, so none of its epochs was found best")
    return result, scores


def _score(entry: Mapping[str, Any], metric: str) -> float | None:
    valid = {name.lower(): value for name, value in entry.get("valid", {}).items()}
    return valid.get(metric)


def _unusable(config: Config, why: str) -> UserError:
    return UserError(
        f"epochs_from={config['epochs_from']}: {why}. Give the folder of a finished, validated run "
        "of the same model",
        keys=("epochs_from",),
    )
