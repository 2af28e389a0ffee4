"""The command that searches for the best setting."""

import argparse
from pathlib import Path
from typing import Any

from recbole_simdiff.cli.parser import COMMANDS, add_model_arguments
from recbole_simdiff.cli.results import print_folder, print_result
from recbole_simdiff.cli.settings import command_config, config_files
from recbole_simdiff.tuning import search as tuning
from recbole_simdiff.tuning import space


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``tune``."""
    parser.description = (
        f"{COMMANDS[command].help.capitalize()}. The space is a RecBole parameter file, by default "
        "properties/search_space/<Model>.hyper; a key given here as --key=value is fixed and not "
        "searched. The same command continues an interrupted search. Started several times, or on "
        "several machines with the same --storage, it shares the trials. The results are "
        "trials.csv and best.yaml in <output>/tune-<model>-<dataset>/."
    )
    add_model_arguments(parser)
    parser.add_argument("--space", metavar="FILE", help="RecBole parameter file")
    parser.add_argument("--engine", default="optuna", help="optuna (default), hyperopt or ray")
    parser.add_argument(
        "--algo", help="bayes, random or exhaustive (default bayes; with engine ray random)"
    )
    parser.add_argument("--trials", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trials at the same time (default 1)"
    )
    parser.add_argument("--storage", metavar="URL", help="Optuna's database, default in <output>")
    parser.add_argument("--output", default="results", metavar="DIR", help="default results")
    parser.add_argument(
        "--no_pruning", action="store_true", help="do not stop trials with low scores early"
    )


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Search for the best setting, then test it once."""
    config = command_config(namespace, overrides)
    path = Path(namespace.space) if namespace.space else space.find_space(config.name)
    search = tuning.new_search(
        config,
        space.read_space(path),
        config_files(namespace),
        overrides,
        engine=namespace.engine,
        algo=namespace.algo,
        trials=namespace.trials,
        jobs=namespace.jobs,
        pruning=not namespace.no_pruning,
        storage=namespace.storage,
        output=Path(namespace.output),
    )
    trials = tuning.tune(search)
    print(tuning.summary(search, trials))
    result = tuning.test_best(search, search.ranked(trials)[0])
    print_result(result)
    print_folder(result)
    return 0
