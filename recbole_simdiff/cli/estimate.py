"""The command that tells what a training will cost."""

import argparse
from typing import Any

from recbole_simdiff.cli.parser import add_model_arguments
from recbole_simdiff.cli.settings import command_config
from recbole_simdiff.runs.estimate import STEPS, Estimate, duration, estimate


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``estimate``."""
    parser.description = (
        "Memory and seconds of train with the same arguments, on this machine as busy as it is "
        "now: reads the data, takes a few steps, validates once and keeps no checkpoint. Every "
        "other --key=value overrides the configuration."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"steps to time (default {STEPS})"
    )


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Print what the training will cost."""
    config = command_config(namespace, overrides)
    print(as_text(f"{config.name} on {config.dataset}", estimate(config, namespace.steps)))
    return 0


def as_text(title: str, found: Estimate) -> str:
    """An estimate in words.

    Args:
        title (str): model and data set.
        found (Estimate): the estimate.
    """
    lines = [
        f"{title}: {found.parameters:,} parameters",
        f"data and model:  {found.data_seconds:.1f} s",
    ]
    for phase in found.phases:
        name = f" ({phase.name})" if len(found.phases) > 1 else ""
        lines.append(
            f"an epoch{name}:  {found.epoch_seconds(phase):.1f} s: {phase.steps:,} steps of "
            f"{phase.step_seconds:.3f} s, {phase.validations:.2g} validations of "
            f"{found.validation_seconds:.1f} s; at most {phase.epochs:,} epochs"
        )
    lines += [
        f"saving:  {found.save_seconds:.1f} s after each epoch",
        f"training and validation:  at most {duration(found.seconds)}; early stopping may end it "
        "sooner",
        f"peak memory:  {found.memory_mb / 1024:.2f} GiB",
    ]
    if found.gpu_memory_mb:
        lines.append(f"peak memory on the GPU:  {found.gpu_memory_mb / 1024:.2f} GiB")
    return "\n".join(lines)
