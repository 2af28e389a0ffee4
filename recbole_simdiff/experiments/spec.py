"""What an experiment consists of: rows x data sets x swept values x seeds, one run each.

An experiment is a YAML file under ``properties/experiment/`` or anywhere else:

    kind: benchmark              # benchmark | ablation | sweep | statistics
    title: what it shows
    datasets: [amazon-beauty]
    seeds: [2020, 2021]
    settings: {epochs: 100}      # of every run
    rows:                        # label -> settings; without ``model`` the label is the model
      SASRec: {}
      SimDiffRec without contrast: {model: SimDiffRec, cl_weight: 0}
    sweep: {k_noise: [5, 30]}    # of kind sweep: one key at a time, the others as they are
    reference: SASRec            # the row that others are compared with; the first by default
    metrics: [ndcg@10]           # columns
    figures: [curves]            # besides those of a sweep: curves | cost | embeddings
    cited:                       # published numbers, shown beside
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

from recbole_simdiff.config import Config, properties_dir, read_yaml
from recbole_simdiff.errors import UserError
from recbole_simdiff.trainer import PROTOCOLS

KINDS = ("benchmark", "ablation", "sweep", "statistics")
FIGURES = ("curves", "cost", "embeddings")
METRICS = ("hit@5", "hit@10", "ndcg@5", "ndcg@10")


@dataclass(frozen=True)
class RunSpec:
    """One training and its test.

    Attributes:
        row (str): label in tables and legends.
        model (str): the model's name.
        dataset (str): the data set's name.
        swept (tuple | None): key and value of the sweep.
        seed (int): of everything random.
        settings (dict): values that differ from the defaults.
    """

    row: str
    model: str
    dataset: str
    swept: tuple[str, Any] | None
    seed: int
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        swept = f" {self.swept[0]}={self.swept[1]}" if self.swept else ""
        return f"{self.row}{swept} on {self.dataset}, seed {self.seed}"

    def overrides(self) -> dict[str, Any]:
        """The settings of the run, seed and swept value included."""
        swept = dict([self.swept]) if self.swept else {}
        return {**self.settings, **swept, "seed": self.seed}


@dataclass(frozen=True)
class Cited:
    """Published numbers.

    Attributes:
        source (str): where they stand.
        protocol (str): under which they were measured; one of ``PROTOCOLS``.
        metrics (tuple): names of the columns.
        values (dict): data set -> row -> values in the order of ``metrics``; None for none.
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
    """See the module's docstring for the fields.

    Attributes:
        command (dict): values given on the command line, over all others.
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
        """Every run, seeds innermost."""
        swept_values: list[tuple[str, Any] | None] = [
            (key, value) for key, listed in self.sweep.items() for value in listed
        ]
        found = []
        for dataset in self.datasets:
            for row, own in self.rows.items():
                settings = {**self.settings, **own, **self.command}
                model = str(settings.pop("model", row))
                for swept in swept_values or [None]:
                    for seed in self.seeds:
                        found.append(RunSpec(row, model, dataset, swept, seed, settings))
        return found

    def config(self, spec: RunSpec) -> Config:
        """The resolved configuration of a run.

        Raises:
            UserError: naming the run, if it cannot be made.
        """
        overrides = {**spec.overrides(), "save_rankings": True}
        try:
            return Config(spec.model, spec.dataset, (), overrides, f"experiment {self.name}")
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None


def load_experiment(place: str) -> Experiment:
    """An experiment by the name of a file under ``properties/experiment/``, or by path.

    Raises:
        UserError: if there is none, or it does not say what to run.
    """
    folder = properties_dir() / "experiment"
    path = Path(place)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{place}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"experiment {place!r} is neither a .yaml file nor one of {known}")
    return _experiment(path.stem, read_yaml(path), str(path))


def _experiment(name: str, content: Mapping[str, Any], source: str) -> Experiment:
    known = [key for key in Experiment.__dataclass_fields__ if key not in ("name", "command")]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{source}: unknown key {key!r}; {hint}")
    for key in ("kind", "title", "datasets"):
        if key not in content:
            raise UserError(f"{source} lacks {key!r}")
    kind = content["kind"]
    if kind not in KINDS:
        raise UserError(f"{source}: kind={kind!r} is not one of {', '.join(KINDS)}")
    for key, needed in (("rows", kind != "statistics"), ("sweep", kind == "sweep")):
        value = content.get(key, {})
        if needed != bool(value) or not isinstance(value, Mapping):
            wanted = "needs" if needed else "has no"
            raise UserError(f"{source}: kind={kind} {wanted} {key}, a mapping; got {value!r}")
    rows = {
        str(row): _mapping(own, f"{source}: row {row}")
        for row, own in content.get("rows", {}).items()
    }
    sweep = {
        key: _list(values, f"{source}: sweep of {key}")
        for key, values in content.get("sweep", {}).items()
    }
    reference = str(content.get("reference", next(iter(rows), "")))
    if rows and reference not in rows:
        raise UserError(f"{source}: reference={reference!r} is not one of {', '.join(rows)}")
    return Experiment(
        name=name,
        kind=kind,
        title=str(content["title"]),
        datasets=tuple(map(str, _list(content["datasets"], f"{source}: datasets"))),
        seeds=seeds(content.get("seeds", [2020]), source),
        rows=rows,
        settings=_mapping(content.get("settings"), f"{source}: settings"),
        sweep=sweep,
        reference=reference,
        metrics=tuple(_list(content.get("metrics", METRICS), f"{source}: metrics")),
        figures=figures(content.get("figures", ()), f"{source}: figures"),
        cited=tuple(_cited(part, source) for part in content.get("cited") or ()),
    )


def plain_experiment(
    models: Sequence[str], datasets: Sequence[str], numbers: Sequence[int]
) -> Experiment:
    """A benchmark of models at their defaults, without a file."""
    return Experiment(
        name="benchmark",
        kind="benchmark",
        title=f"{', '.join(models)} at their defaults",
        datasets=tuple(datasets),
        seeds=tuple(numbers),
        rows={model: {} for model in models},
        reference=models[0],
    )


def select(
    experiment: Experiment,
    models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    numbers: Sequence[int] = (),
    command: Mapping[str, Any] | None = None,
) -> Experiment:
    """The experiment with fewer rows, other data sets or seeds, or values of the command line.

    Args:
        experiment (Experiment): as read.
        models (Sequence): labels of the rows to keep; all if empty.
        datasets (Sequence): in place of its own, if given.
        numbers (Sequence): seeds in place of its own, if given.
        command (Mapping | None): values over all others.

    Raises:
        UserError: for a row that it does not have, or a swept key among the values.
    """
    rows = dict(experiment.rows)
    for model in models:
        if model not in rows:
            raise UserError(
                f"--models: {model!r} is not a row of {experiment.name}; it has {', '.join(rows)}"
            )
    swept = set(command or ()) & set(experiment.sweep)
    if swept:
        raise UserError(f"--{swept.pop()} is swept by {experiment.name} and cannot be fixed")
    rows = {row: own for row, own in rows.items() if not models or row in models}
    reference = experiment.reference if experiment.reference in rows else next(iter(rows), "")
    return replace(
        experiment,
        rows=rows,
        reference=reference,
        datasets=tuple(datasets) or experiment.datasets,
        seeds=tuple(numbers) or experiment.seeds,
        command=dict(command or {}),
    )


def with_figures(experiment: Experiment, names: Sequence[str]) -> Experiment:
    """The experiment with other figures."""
    return replace(experiment, figures=tuple(names))


def seeds(value: Any, source: str) -> tuple[int, ...]:
    """Seeds from a list.

    Raises:
        UserError: if they are not different whole numbers.
    """
    listed = _list(value, f"{source}: seeds")
    if any(type(seed) is not int or seed < 0 for seed in listed) or len(set(listed)) < len(listed):
        raise UserError(f"{source}: seeds={listed} must be different whole numbers")
    return tuple(listed)


def figures(value: Any, what: str) -> tuple[str, ...]:
    """Names of figures from a list, which may be empty.

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
        raise UserError(f"{what} must be a list with something in it, not {value!r}")
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
        raise UserError(f"{source}: each entry of cited has {', '.join(sorted(keys))}")
    if part["protocol"] not in PROTOCOLS:
        raise UserError(
            f"{source}: protocol={part['protocol']!r} is not one of {', '.join(PROTOCOLS)}"
        )
    metrics = tuple(part["metrics"])
    for dataset, rows in part["values"].items():
        for row, values in rows.items():
            if len(values) != len(metrics):
                raise UserError(f"{source}: {row} on {dataset} has not one value for each metric")
    return Cited(str(part["source"]), part["protocol"], metrics, part["values"])


def check(experiment: Experiment) -> Iterable[tuple[RunSpec, Config]]:
    """Every run with its configuration, all made before any is started.

    Raises:
        UserError: for the first that is impossible, or a metric that is not computed.
    """
    found = [(spec, experiment.config(spec)) for spec in experiment.runs()]
    for spec, config in found:
        names = {f"{m.lower()}@{k}" for m in config["metrics"] for k in config["topk"]}
        for metric in experiment.metrics:
            if metric not in names:
                raise UserError(
                    f"{spec}: {metric} is not computed; metrics={config['metrics']}, "
                    f"topk={config['topk']}"
                )
    return found
