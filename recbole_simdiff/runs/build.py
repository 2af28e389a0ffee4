"""Data set, loaders and model of a configuration, and the evaluation of its splits."""

import statistics
from typing import Any, NamedTuple

from recbole.utils import init_seed
from torch import Tensor

from recbole_simdiff.config.config import Config
from recbole_simdiff.data.dataset import FlatDataset, create_dataset
from recbole_simdiff.data.item_vectors import apply_item_vectors
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import UserError, explained_out_of_memory
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.protocols import KEPT, PROTOCOLS, Metrics
from recbole_simdiff.models.registry import build_model

PSEUDO = "data.pseudo"  # pseudo-items of each user, in the checkpoint of a run on augmented data


def build_run(
    config: Config, pseudo: Tensor | None = None
) -> tuple[FlatDataset, Any, Any, Any, Any]:
    """Data set, training, validation and test loader, and the model on its device, all seeded.

    Args:
        config (Config): resolved configuration.
        pseudo (LongTensor | None): pseudo-items of each user, [users, M].
    """
    init_seed(config["seed"], config["reproducibility"])
    pseudo = None if pseudo is None else pseudo.long()
    with config.naming_origins(), explained_out_of_memory(config):
        dataset = create_dataset(config)
        train_data, valid_data, test_data = create_loaders(config, dataset, pseudo)
        n_items = dataset.item_num - 1
        if max(config["topk"]) > n_items:
            raise UserError(
                f"topk={config['topk']} exceeds the {n_items} items there are", keys=("topk",)
            )
        init_seed(config["seed"], config["reproducibility"])
        model = build_model(config, train_data._dataset).to(config["device"])
        apply_item_vectors(config, dataset, model)
    return dataset, train_data, valid_data, test_data, model


class SplitMetrics(NamedTuple):
    """Metrics of a trained model; see ``RunResult`` and ``Evaluation`` for the fields."""

    splits: dict[str, dict[str, Metrics]]
    by_length: dict[str, Metrics]
    sampling: dict[str, Any]
    rankings: dict[Any, Tensor]


def evaluate_splits(evaluator: Evaluator, valid_data: Any, test_data: Any) -> SplitMetrics:
    """Both splits under both protocols, and test by input length and over sampling seeds."""
    config, splits = evaluator.config, {}
    by_length: dict[str, Metrics] = {}
    rankings: dict[Any, Tensor] = {}
    sampling: dict[str, Any] = {}
    show = config["show_progress"]
    if valid_data:
        splits["valid"] = evaluator.evaluate(valid_data, PROTOCOLS, show)
    if test_data:
        splits["test"], by_length, rankings = evaluator.evaluate_in_detail(
            test_data, config["length_groups"], show
        )
        several = "sampling_seeds" in config and config["sampling_seeds"] > 1
        if several and evaluator.model.reseed_sampling(config["sampling_seed"]):
            sampling = _over_sampling_seeds(evaluator, test_data, splits["test"][KEPT])
    return SplitMetrics(splits, by_length, sampling, rankings)


def _over_sampling_seeds(evaluator: Evaluator, test_data: Any, first: Metrics) -> dict[str, Any]:
    """Mean and standard deviation of the test metrics over the model's sampling seeds."""
    model, config = evaluator.model, evaluator.config
    seed, results = config["sampling_seed"], [first]
    for offset in range(1, config["sampling_seeds"]):
        model.reseed_sampling(seed + offset)
        results.append(evaluator.evaluate(test_data, (KEPT,), config["show_progress"])[KEPT])
    model.reseed_sampling(seed)
    spread = {
        name: {
            "mean": statistics.mean(values[name] for values in results),
            "std": statistics.stdev(values[name] for values in results),
        }
        for name in first
    }
    return {"seeds": [seed + offset for offset in range(len(results))], **spread}
