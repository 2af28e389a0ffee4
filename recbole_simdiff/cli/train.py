"""The command that trains."""

import argparse
import os
import sys
from typing import Any

from recbole_simdiff import checkpoint, distributed
from recbole_simdiff.checkpoint import LAST
from recbole_simdiff.cli.messages import printable
from recbole_simdiff.cli.parser import add_model_arguments, add_model_file
from recbole_simdiff.cli.results import print_folder, print_result
from recbole_simdiff.cli.settings import command_config
from recbole_simdiff.config.config import COMMAND_LINE
from recbole_simdiff.errors import UserError
from recbole_simdiff.models.registry import accept
from recbole_simdiff.pipelines.start import start
from recbole_simdiff.runs.processes import check_processes
from recbole_simdiff.runs.restore import resumed_config
from recbole_simdiff.runs.result import RunResult
from recbole_simdiff.serving.recommender import load


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``train``."""
    parser.description = (
        "Train a model. Every other --key=value overrides the configuration; 'list --explain' "
        "shows all keys."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--resume", metavar="RUN", help="folder of a stopped run, or its last.safetensors"
    )
    add_model_file(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes on this host that train together (default 1); torchrun starts them on "
        "several. With --resume, the number of all processes where it is not that of before: "
        "their random states are drawn anew",
    )


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Train a model, or continue a stopped run."""
    resume = None
    is_distributed = distributed.is_distributed()
    given = namespace.nproc
    n = int(os.environ["WORLD_SIZE"]) if is_distributed else 1 if given is None else given
    if given not in (None, n):
        raise UserError(
            f"--nproc={given} was given to a run of {n} processes that torchrun started; leave "
            f"--nproc out, or give --nproc={n} to resume with another number than before"
        )
    if namespace.resume:
        for key in ("model", "dataset", "config_files"):
            if getattr(namespace, key):
                raise UserError(f"--{key} cannot be given with --resume: the checkpoint fixes it")
        accept(namespace.model_file)
        resume = checkpoint.resolve(namespace.resume, LAST)
        config = resumed_config(resume, overrides, COMMAND_LINE, n, any_number=given == n)
    elif namespace.model_file:
        raise UserError(
            "--model_file is for --resume, whose checkpoint says the class; to train a model give "
            f"--model={namespace.model_file}:CLASS"
        )
    else:
        config = command_config(namespace, overrides)
    check_processes(config, n)
    if n > 1 and not is_distributed:
        return distributed.launch(n)
    with distributed.group():
        result = start(config, resume)
        if distributed.rank() > 0:
            return 0
    print_result(result)
    print_folder(result)
    try:
        _show_users(result, config["show_users"])
    except UserError as error:  # the run itself succeeded
        print(error, file=sys.stderr)
    return 0


def _show_users(result: RunResult, n_users: int) -> None:
    if not n_users:
        return
    recommender = load(result.run_dir, result.config["values"]["use_gpu"])
    for user in recommender.users[:n_users]:
        history = recommender.history(user)
        (recommendation,) = recommender.recommend([history], k=10)
        print(f"\nuser {printable(user)}, newest of {len(history)}:")
        for item in history[-5:]:
            print(f"    {printable(recommender.title(item))}")
        print("  recommended next:")
        for rank, item in enumerate(recommendation.items, start=1):
            print(f"  {rank:>2}  {printable(recommender.title(item))}")
