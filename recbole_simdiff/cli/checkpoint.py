"""The commands on checkpoint files."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from recbole_simdiff.checkpoint import BEST, resolve
from recbole_simdiff.errors import UserError
from recbole_simdiff.files import write_text
from recbole_simdiff.serving.card import card
from recbole_simdiff.serving.hub import pull, push
from recbole_simdiff.serving.strip import strip


class _Action(NamedTuple):
    """Options that an action needs, and that it may have besides."""

    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()


ACTIONS = {
    "strip": _Action(("checkpoint", "output")),
    "card": _Action(("checkpoint",), ("output",)),
    "push": _Action(("checkpoint", "repository")),
    "pull": _Action(("repository", "output")),
}


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``checkpoint``."""
    parser.usage = "%(prog)s {strip,card,push,pull} [options]"
    parser.description = (
        "strip writes a checkpoint without users, their histories and the state of training. It "
        "recommends to given histories, exports and serves as before; nothing else reads it. card "
        "writes a model card, beside the checkpoint by default. push uploads card and stripped "
        "checkpoint to the Hugging Face Hub, pull downloads them (pip install "
        "'recbole_simdiff[hub]')."
    )
    parser.add_argument("--action", choices=ACTIONS, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", metavar="RUN", help="run folder or file; not for pull")
    parser.add_argument(
        "--output", help="strip: .safetensors file; card: .md file; pull: folder of the run"
    )
    parser.add_argument("--repository", metavar="OWNER/NAME", help="of push and pull")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Do the action, and print what it has written."""
    if overrides:
        raise UserError(
            f"checkpoint does not know --{next(iter(overrides))}; see checkpoint --help"
        )
    given = {k: getattr(namespace, k) for k in ("checkpoint", "output", "repository")}
    action = ACTIONS[namespace.action]
    for key, value in given.items():
        if value is None and key in action.needs:
            raise UserError(f"checkpoint {namespace.action} needs --{key}")
        if value is not None and key not in (*action.needs, *action.may_have):
            raise UserError(f"checkpoint {namespace.action} does not use --{key}")
    if namespace.action == "strip":
        strip(given["checkpoint"], Path(given["output"]))
        print(given["output"])
    elif namespace.action == "card":
        beside = resolve(given["checkpoint"], BEST).with_name("card.md")
        target = Path(given["output"] or beside)
        write_text(target, card(given["checkpoint"]))
        print(target)
    elif namespace.action == "push":
        print(push(given["checkpoint"], given["repository"]))
    else:
        print(pull(given["repository"], Path(given["output"])))
    return 0
