"""Specification of an experiment: rows x data sets x swept values x seeds, one run each.

An experiment is a YAML file under ``properties/experiment/`` or anywhere else:

    kind: benchmark              # benchmark | ablation | sweep | statistics
    title: Sequential recommenders
    datasets: [amazon-beauty]
    seeds: [2020, 2021]
    settings: {epochs: 100}      # of every run
    rows:                        # label -> settings; without ``model`` the label is the model
      SASRec: {}
      SimDiffRec without contrast: {model: SimDiffRec, cl_weight: 0}
    sweep: {k_noise: [5, 30]}    # of kind sweep: one key is varied at a time
    reference: SASRec            # the row that others are compared with; the first by default
    metrics: [ndcg@10]           # columns
    figures: [curves]            # besides a sweep's and an ablation's: curves | cost | embeddings
    cited:                       # published numbers, shown in the same table
      - source: the paper, Table 2
        protocol: history kept
        metrics: [hit@10, ndcg@10]
        values: {amazon-beauty: {SASRec: [0.0557, 0.0245]}}
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recbole_simdiff.config.layers import properties_dir, read_yaml
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.protocols import PROTOCOLS

KINDS = ("benchmark", "ablation", "sweep", "statistics")
FIGURES = ("curves", "cost", "embeddings")
RANKED = ("hit", "recall", "ndcg", "mrr")  # metrics that follow from the rank of the one target
# Key that cannot be a setting of an experiment -> what to use in its place.
REPLACED = {
    "model": "use rows, or --models to keep some of them",
    "dataset": "use datasets, or --datasets",
    "seed": "use seeds, or --seeds",
    "save_rankings": "experiments always save rankings",
    "nproc": "each run is one process; use --jobs=N for N runs at the same time",
}
METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")


@dataclass(frozen=True)
class RunSpec:
    """One training and its test.

    Attributes:
        row (str): label in tables and legends.
        model (str): the model's name.
        dataset (str): the data set's name.
        swept (tuple | None): key and value of the sweep, if there is one.
        seed (int): of everything random.
        settings (dict): values that override the defaults.
    """

    row: str
    model: str
    dataset: str
    swept: tuple[str, Any] | None
    seed: int
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{label(self.row, self.swept)} on {self.dataset}, seed {self.seed}"

    def overrides(self) -> dict[str, Any]:
        """The settings of the run, seed and swept value included."""
        swept = dict([self.swept]) if self.swept else {}
        return {**self.settings, **swept, "seed": self.seed}


def label(row: str, swept: tuple[str, Any] | None) -> str:
    """Name of a row and its swept value in tables and legends."""
    return row if swept is None else f"{row}, {swept[0]}={swept[1]}"


@dataclass(frozen=True)
class Cited:
    """Published numbers.

    Attributes:
        source (str): where they were published.
        protocol (str): under which they were measured; one of ``PROTOCOLS``.
        metrics (tuple): names of the columns.
        values (dict): data set -> row -> values in the order of ``metrics``; None if not published.
    """

    source: str
    protocol: str
    metrics: tuple[str, ...]
    values: Mapping[str, Mapping[str, Sequence[float | None]]]

    def rows(self, dataset: str) -> dict[str, dict[str, float]]:
        """Row -> metric -> value for a data set."""
        return {
            row: {m: v for m, v in zip(self.metrics, values, strict=True) if v is not None}
            for row, values in self.values.get(dataset, {}).items()
        }


@dataclass(frozen=True)
class Experiment:
    """An experiment; the module's docstring describes the fields of its file.

    Attributes:
        command (dict): values given on the command line, which override all others.
    """

    name: str
    kind: str
    title: str
    datasets: tuple[str, ...]
    seeds: tuple[int, ...] = (2020,)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    reference: str = ""
    metrics: tuple[str, ...] = METRICS
    figures: tuple[str, ...] = ()
    cited: tuple[Cited, ...] = ()
    command: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[RunSpec]:
        """Every run; the innermost loop is over seeds."""
        swept_values: list[tuple[str, Any] | None] = [
            (key, value) for key, values in self.sweep.items() for value in values
        ]
        runs = []
        for dataset in self.datasets:
            for row, row_settings in self.rows.items():
                settings = {**self.settings, **row_settings, **self.command}
                model = str(settings.pop("model", row))
                for swept in swept_values or [None]:
                    for seed in self.seeds:
                        runs.append(RunSpec(row, model, dataset, swept, seed, settings))
        return runs


def load_experiment(name: str) -> Experiment:
    """Read an experiment.

    Args:
        name (str): name of a file under ``properties/experiment/``, or path of a .yaml file.

    Raises:
        UserError: if there is no such file, or its content is not an experiment.
    """
    folder = properties_dir() / "experiment"
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"experiment {name!r} is neither a .yaml file nor one of {known}")
    return _experiment(path.stem, read_yaml(path), str(path))


def _experiment(name: str, content: Mapping[str, Any], source: str) -> Experiment:
    _check_keys(content, source)
    rows = _rows(content, source)
    refuse(_mapping(content.get("settings"), f"{source}: settings"), source)
    sweep = _sweep(content, source)
    cited = content.get("cited")
    reference = str(content.get("reference", next(iter(rows), "")))
    if rows and reference not in rows:
        raise UserError(f"{source}: reference={reference!r} is not one of {', '.join(rows)}")
    datasets = tuple(map(str, _list(content["datasets"], f"{source}: datasets")))
    if len(set(datasets)) < len(datasets):
        raise UserError(f"{source}: datasets={[*datasets]} must be different")
    return Experiment(
        name=name,
        kind=content["kind"],
        title=str(content["title"]),
        datasets=datasets,
        seeds=seeds(content.get("seeds", [2020]), source),
        rows=rows,
        settings=_mapping(content.get("settings"), f"{source}: settings"),
        sweep=sweep,
        reference=reference,
        metrics=_metrics(content.get("metrics", METRICS), source),
        figures=figures(content.get("figures", ()), f"{source}: figures"),
        cited=tuple(
            _cited(part, source) for part in (_list(cited, f"{source}: cited") if cited else ())
        ),
    )


def _check_keys(content: Mapping[str, Any], source: str) -> None:
    """Refuse unknown keys, missing keys, and keys of another kind of experiment."""
    known = [key for key in Experiment.__dataclass_fields__ if key not in ("name", "command")]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{source}: unknown key {key!r}; {hint}")
    for key in ("kind", "title", "datasets"):
        if content.get(key) in (None, ""):
            raise UserError(f"{source} lacks {key!r}")
    kind = content["kind"]
    if kind not in KINDS:
        raise UserError(f"{source}: kind={kind!r} is not one of {', '.join(KINDS)}")
    for key, needed in (("rows", kind != "statistics"), ("sweep", kind == "sweep")):
        value = content.get(key, {})
        if needed != bool(value) or not isinstance(value, Mapping):
            rule = "needs" if needed else "has no"
            raise UserError(f"{source}: kind={kind} {rule} {key}, a mapping; got {value!r}")


def _rows(content: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    rows = {
        str(row): _mapping(settings, f"{source}: row {row}")
        for row, settings in content.get("rows", {}).items()
    }
    for row, settings in rows.items():
        if "," in row:  # --models separates rows by commas
            raise UserError(f"{source}: row {row!r} must have no comma in its label")
        _check_label(row, source)
        refuse({k for k in settings if k != "model"} | content.get("sweep", {}).keys(), source)
    return rows


def _sweep(content: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    sweep = {
        key: _list(values, f"{source}: sweep of {key}")
        for key, values in content.get("sweep", {}).items()
    }
    for key, values in sweep.items():
        if any(isinstance(value, list | dict) for value in values):
            raise UserError(f"{source}: values of a sweep are numbers or text, not {key}={values}")
    return sweep


def plain_experiment(
    models: Sequence[str],
    datasets: Sequence[str],
    run_seeds: Sequence[int],
    metrics: Sequence[str] = METRICS,
) -> Experiment:
    """A benchmark of models at their defaults, without a file.

    Args:
        models, datasets (Sequence): names.
        run_seeds (Sequence): seeds.
        metrics (Sequence): columns.

    Raises:
        UserError: if two models have one name.
    """
    # The class of a user's own FILE.py:CLASS.
    rows = {name.rpartition(":")[2]: {"model": name} if ":" in name else {} for name in models}
    if len(rows) < len(models):
        raise UserError(f"models={', '.join(models)} must have different names")
    return Experiment(
        name="-".join(["benchmark", *rows])[:100],
        kind="benchmark",
        title=f"{', '.join(rows)} at their defaults",
        datasets=tuple(datasets),
        seeds=tuple(run_seeds),
        rows=rows,
        reference=next(iter(rows)),
        metrics=tuple(metrics),
    )


def select(
    experiment: Experiment,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    run_seeds: Sequence[int] = (),
    command: Mapping[str, Any] | None = None,
    origin: str = "overrides",
) -> Experiment:
    """The experiment with fewer rows, other data sets or seeds, or values that override its own.

    Args:
        experiment (Experiment): as read from its file.
        models (Sequence): labels of the rows to keep; all if empty.
        datasets (Sequence): data sets that replace the experiment's; none if empty.
        run_seeds (Sequence): seeds that replace the experiment's; none if empty.
        command (Mapping | None): values that override all others.
        origin (str): name of these values in messages.

    Raises:
        UserError: for a row that the experiment does not have, or a value of a swept key.
    """
    rows = dict(experiment.rows)
    for model in models:
        if model not in rows:
            raise UserError(
                f"--models: {model!r} is not a row of {experiment.name}; it has {', '.join(rows)}"
            )
    refuse(command or (), origin)
    swept = set(command or ()) & set(experiment.sweep)
    if swept:
        raise UserError(f"--{swept.pop()} is swept by {experiment.name} and cannot be fixed")
    rows = {row: rows[row] for row in rows if not models or row in models}
    reference = experiment.reference if experiment.reference in rows else next(iter(rows), "")
    return replace(
        experiment,
        rows=rows,
        reference=reference,
        datasets=tuple(datasets) or experiment.datasets,
        seeds=tuple(run_seeds) or experiment.seeds,
        command=dict(command or {}),
    )


def with_figures(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """The experiment with other figures."""
    return replace(experiment, figures=tuple(names))


def seeds(value: Any, source: str) -> tuple[int, ...]:
    """Seeds from a list.

    Args:
        value (Any): the list.
        source (str): where it was given, for the message.

    Raises:
        UserError: if they are not different whole numbers.
    """
    listed = _list(value, f"{source}: seeds")
    if any(type(seed) is not int or not 0 <= seed < 2**32 for seed in listed) or len(
        set(listed)
    ) < len(listed):
        raise UserError(f"{source}: seeds={listed} must be different whole numbers")
    return tuple(listed)


def figures(value: Any, what: str) -> tuple[str, ...]:
    """Names of figures from a list, which may be empty.

    Args:
        value (Any): the list.
        what (str): its name in the message.

    Raises:
        UserError: for an unknown one.
    """
    listed = _list(value, what) if value else []
    for name in listed:
        if name not in FIGURES:
            raise UserError(f"{what}: {name!r} is not one of {', '.join(FIGURES)}")
    return tuple(listed)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{what} must be a list with at least one element, not {value!r}")
    return list(value)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a mapping of keys to values, not {value!r}")
    return value


def _cited(part: Any, source: str) -> Cited:
    keys = {"source", "protocol", "metrics", "values"}
    if not isinstance(part, dict) or part.keys() != keys:
        raise UserError(f"{source}: each entry of cited needs exactly {', '.join(sorted(keys))}")
    if part["protocol"] not in PROTOCOLS:
        raise UserError(
            f"{source}: protocol={part['protocol']!r} is not one of {', '.join(PROTOCOLS)}"
        )
    metrics = _metrics(part["metrics"], source)
    cited = {
        str(dataset): _mapping(rows, f"{source}: values of {dataset}")
        for dataset, rows in _mapping(part["values"], f"{source}: values").items()
    }
    for dataset, rows in cited.items():
        for row, values in rows.items():
            _check_label(row, source)
            numbers = isinstance(values, list) and len(values) == len(metrics)
            if not numbers or any(not isinstance(v, int | float | None) for v in values):
                raise UserError(f"{source}: {row} on {dataset} needs one number for each metric")
    _check_label(part["source"], source)
    return Cited(str(part["source"]), part["protocol"], metrics, cited)


def _check_label(label: Any, source: str) -> None:
    if set("|\n\r") & set(str(label)):
        raise UserError(
            f"{source}: {label!r} is shown in tables and must have no | and no line break"
        )


def _metrics(value: Any, source: str) -> tuple[str, ...]:
    """Names such as ndcg@10, of metrics that follow from the rank of one item."""
    listed = _list(value, f"{source}: metrics")
    for metric in listed:
        name, _, k = str(metric).partition("@")
        if name not in RANKED or not k.isdigit():
            raise UserError(
                f"{source}: metric {metric!r} must be one of {', '.join(RANKED)} at a cutoff, such "
                "as ndcg@10"
            )
    return tuple(listed)


def refuse(keys: Iterable[str], source: str) -> None:
    """Refuse keys that cannot be settings of an experiment.

    Args:
        keys (Iterable): names.
        source (str): where they were given, for the message.

    Raises:
        UserError: naming the first such key, and what to use in its place.
    """
    for key in keys:
        if key in REPLACED:
            raise UserError(f"{source}: {key} cannot be a setting of experiments: {REPLACED[key]}")
