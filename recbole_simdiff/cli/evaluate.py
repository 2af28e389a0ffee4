"""The command that evaluates a checkpoint, or lists that another program made."""

import argparse
from pathlib import Path
from typing import Any

import torch

from recbole_simdiff.cli.parser import add_data_arguments, add_model_file
from recbole_simdiff.cli.results import print_result
from recbole_simdiff.cli.settings import command_config
from recbole_simdiff.config.config import COMMAND_LINE, Config
from recbole_simdiff.config.keys import EVALUATION_KEYS
from recbole_simdiff.data.dataset import create_dataset
from recbole_simdiff.data.loaders import create_loaders
from recbole_simdiff.errors import UserError
from recbole_simdiff.evaluation.evaluator import Evaluator
from recbole_simdiff.evaluation.lists import ListedItems, read_lists, unseen_lengths
from recbole_simdiff.evaluation.protocols import Metrics
from recbole_simdiff.log import logger
from recbole_simdiff.runs.restore import evaluate
from recbole_simdiff.runs.result import format_table

MODEL = "SASRecCE"  # whose settings of data and evaluation hold for lists


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``evaluate``."""
    parser.description = (
        "Validation and test of a checkpoint's model, as at the end of its training. These "
        f"--key=value of the configuration can be changed: {', '.join(EVALUATION_KEYS)}; for "
        "DreamRec also those of its generation. With --lists, the test of lists that another "
        "program made, under both protocols; then --key=value is any setting of data and "
        "evaluation."
    )
    parser.add_argument("--checkpoint", metavar="RUN", help="run folder or .safetensors file")
    add_model_file(parser)
    parser.add_argument(
        "--lists",
        metavar="FILE",
        help="CSV with a header: user, item, and rank or score; .tsv; or a TREC run file (.trec)",
    )
    add_data_arguments(parser)


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Evaluate a checkpoint on its data set, or lists on theirs."""
    if (namespace.checkpoint is None) == (namespace.lists is None):
        raise UserError("evaluate needs --checkpoint=RUN, or --lists=FILE with --dataset=NAME")
    if namespace.lists is not None:
        if namespace.model_file:
            raise UserError("--model_file is for --checkpoint")
        namespace.model = MODEL
        metrics = _evaluate_lists(Path(namespace.lists), command_config(namespace, overrides))
        print(format_table({"test": metrics}))
        return 0
    for key in ("dataset", "config_files"):
        if getattr(namespace, key):
            raise UserError(f"--{key} is for --lists: a checkpoint fixes it")
    print_result(
        evaluate(namespace.checkpoint, overrides, origin=COMMAND_LINE, model=namespace.model_file)
    )
    return 0


def _evaluate_lists(path: Path, config: Config) -> dict[str, Metrics]:
    """Test metrics of lists by protocol."""
    if "test" not in config.held_out or config["eval_args"]["mode"]["test"] != "full":
        raise UserError(
            f"eval_args={config['eval_args']}: lists are tested among all items, which needs a "
            "test part and mode=full"
        )
    dataset = create_dataset(config)
    train_data, _, test_data = create_loaders(config, dataset)
    users = test_data._dataset.inter_feat[dataset.uid_field]
    if len(users.unique()) < len(users):
        raise UserError(
            f"eval_args={config['eval_args']} gives {len(users):,} test rows of "
            f"{len(users.unique()):,} users; a list for each user needs one row a user, as "
            "leave-one-out (LS) has"
        )
    items = read_lists(path, dataset)
    lengths = (items[users] > 0).sum(1)
    longest = max(config["topk"])
    if short := int((lengths < longest).sum()):
        logger.warning(
            f"{path}: {short:,} of {len(users):,} tested users have fewer than {longest} items "
            f"({int((lengths == 0).sum()):,} have none); what is not listed is not found"
        )
    left = unseen_lengths(items, dataset, test_data._dataset.inter_feat)
    if cut := int(((left < longest) & (lengths >= longest)).sum()):
        logger.warning(
            f"{path}: without the items of their histories {cut:,} of {len(users):,} lists have "
            f"fewer than {longest} items, so figures with the history removed are too low; give "
            "longer lists"
        )
    model = ListedItems(items, dataset.item_num, dataset.uid_field)
    evaluator = Evaluator(config, model, torch.device("cpu"))
    evaluator.data_collect(train_data)
    return evaluator.evaluate(test_data)
