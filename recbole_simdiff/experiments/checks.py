"""Checks that the runs of an experiment are possible, and their metrics comparable."""

from collections.abc import Iterable, Sequence

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.spec import Experiment, RunSpec

UNRANKED = {"gauc", "auc", "logloss", "mae", "rmse"}  # metrics that need no list of top items
# Keys that set which interactions are tested, and against which items.
TESTED_ROWS = (
    "eval_args",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "filter_inter_by_user_or_item",
    "rm_dup_inter",
)


def check(experiment: Experiment) -> Iterable[tuple[RunSpec, Config]]:
    """Every run with its configuration, before any is started.

    Raises:
        UserError: for the first run that is impossible, or a metric that is not computed.
    """
    configs: dict[str, Config] = {}  # runs that share one differ in the seed only
    runs = []
    for spec in experiment.runs():
        key = repr((spec.model, spec.dataset, spec.settings, spec.swept))
        if key not in configs:
            configs[key] = _config(experiment, spec)
        runs.append((spec, configs[key].with_seed(spec.seed)))
    _check_protocol(experiment, runs)
    return runs


def _config(experiment: Experiment, spec: RunSpec) -> Config:
    origin = f"experiment {experiment.name}"
    try:
        config = Config(spec.model, spec.dataset, (), spec.overrides(), origin)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from None
    names = {f"{m.lower()}@{k}" for m in config["metrics"] for k in config["topk"]}
    for metric in experiment.metrics:
        if metric not in names:
            raise UserError(
                f"{spec}: {metric} is not computed; metrics={config['metrics']}, "
                f"topk={config['topk']}"
            )
    modes = config["eval_args"]["mode"]  # part -> mode
    if set(modes.values()) != {"full"} or UNRANKED & {m.lower() for m in config["metrics"]}:
        raise UserError(
            f"{spec}: experiments compare ranks among all items. eval_args needs mode=full, not "
            f"{modes}; metrics={config['metrics']} must not include {', '.join(sorted(UNRANKED))}"
        )
    if not config.held_out:
        raise UserError(
            f"{spec}: eval_args has split={config['eval_args']['split']}. It uses all data for "
            "training, so there is no metric to compare"
        )
    config["save_rankings"] = True
    return config


def _check_protocol(experiment: Experiment, runs: Sequence[tuple[RunSpec, Config]]) -> None:
    """Refuse to compare runs that are tested on different rows."""
    references: dict[str, tuple[RunSpec, Config]] = {}  # data set -> its first run
    for spec, config in runs:
        first, settings = references.setdefault(spec.dataset, (spec, config))
        for key in TESTED_ROWS:
            if config[key] != settings[key]:
                raise UserError(
                    f"{experiment.name}: {first} has {key}={settings[key]}, {spec} has "
                    f"{config[key]}; their metrics cannot be compared"
                )
