"""Whether the runs of an experiment are possible, and their metrics comparable."""

from collections.abc import Iterable, Sequence

from recbole_simdiff.config.config import Config
from recbole_simdiff.errors import UserError
from recbole_simdiff.experiments.spec import Experiment, RunSpec

UNRANKED = {"gauc", "auc", "logloss", "mae", "rmse"}  # for which RecBole collects no top items
# What decides which interactions are tested, and against which items.
TESTED_ROWS = (
    "eval_args",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "filter_inter_by_user_or_item",
    "rm_dup_inter",
)


def check(experiment: Experiment) -> Iterable[tuple[RunSpec, Config]]:
    """Every run with its configuration, all made before any is started.

    Raises:
        UserError: for the first that is impossible, or a metric that is not computed.
    """
    made: dict[str, Config] = {}  # they differ by the seed alone
    found = []
    for spec in experiment.runs():
        key = repr((spec.model, spec.dataset, spec.settings, spec.swept))
        if key not in made:
            made[key] = _config(experiment, spec)
        found.append((spec, made[key].with_seed(spec.seed)))
    _check_protocol(experiment, found)
    return found


def _config(experiment: Experiment, spec: RunSpec) -> Config:
    place = f"experiment {experiment.name}"
    try:
        config = Config(spec.model, spec.dataset, (), spec.overrides(), place)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from None
    names = {f"{m.lower()}@{k}" for m in config["metrics"] for k in config["topk"]}
    for metric in experiment.metrics:
        if metric not in names:
            raise UserError(
                f"{spec}: {metric} is not computed; metrics={config['metrics']}, "
                f"topk={config['topk']}"
            )
    modes = config["eval_args"]["mode"]  # RecBole's config says it for each part
    if set(modes.values()) != {"full"} or UNRANKED & {m.lower() for m in config["metrics"]}:
        raise UserError(
            f"{spec}: experiments compare ranks among all items: eval_args needs mode=full, not "
            f"{modes}, and metrics={config['metrics']} must be of ranked lists"
        )
    if not config.held_out:
        raise UserError(
            f"{spec}: eval_args has split={config['eval_args']['split']}, which trains on "
            "everything and leaves no metric to compare"
        )
    config["save_rankings"] = True
    return config


def _check_protocol(experiment: Experiment, found: Sequence[tuple[RunSpec, Config]]) -> None:
    """Refuse to put side by side what is tested on different rows."""
    first: dict[str, tuple[RunSpec, Config]] = {}
    for spec, config in found:
        one, settings = first.setdefault(spec.dataset, (spec, config))
        for key in TESTED_ROWS:
            if config[key] != settings[key]:
                raise UserError(
                    f"{experiment.name}: {one} has {key}={settings[key]}, {spec} has "
                    f"{config[key]}; their metrics cannot be compared"
                )
