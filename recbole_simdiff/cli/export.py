"""The command that writes what other programs serve a model with."""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from recbole_simdiff.cli.histories import read_histories
from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.errors import UserError
from recbole_simdiff.serving import recommender as inference
from recbole_simdiff.serving.network import NETWORKS, export_network
from recbole_simdiff.serving.vectors import FORMATS, write_vectors


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``export``."""
    parser.description = (
        f"Vectors ({', '.join(FORMATS)}): writes items.<format>, a vector of each item, and with "
        "--histories users.<format>, a vector of each history; the product of two is the model's "
        "score. The network: writes model.onnx (ONNX) or model.pt2 (a torch.export program), from "
        "numbers of items to scores, and items.json, the ids by number. csv, npz and pt2 need no "
        "more than the package; the others its extra export."
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder or file")
    add_model_file(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format", choices=(*FORMATS, *NETWORKS), default="npz", help="default npz"
    )
    parser.add_argument(
        "--histories",
        metavar="FILE",
        help="file of histories as of recommend --input, or - for standard input",
    )
    parser.add_argument("--use_gpu", choices=("true", "false"), default="true")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Write the files."""
    if overrides:
        raise UserError(f"export does not know --{next(iter(overrides))}; see export --help")
    network = namespace.format in NETWORKS
    if network and namespace.histories:
        raise UserError(f"--histories belongs to vectors ({', '.join(FORMATS)}), not to a network")
    recommender = inference.load(
        namespace.checkpoint, namespace.use_gpu == "true" and not network, namespace.model_file
    )
    output = Path(namespace.output)
    if network:
        print(*export_network(recommender, output, namespace.format), sep="\n")
        return 0
    if namespace.histories:
        _write_users(recommender, namespace.histories, output / f"users.{namespace.format}")
    path = output / f"items.{namespace.format}"
    write_vectors(recommender.item_vectors(), path)
    print(path)
    return 0


def _write_users(recommender: inference.Recommender, place: str, path: Path) -> None:
    """Write the vectors of the histories of a file.

    Raises:
        UserError: if two have the same name, or none has a known item.
    """
    histories: dict[str, list[str]] = {}
    for one in read_histories(place, "histories"):
        if one.name in histories:
            raise UserError(f"{place}: two histories are called {one.name!r}")
        histories[one.name] = one.items
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", inference.UnknownItems)  # said below
        vectors = recommender.user_vectors(histories)
    if not vectors.ids:
        raise UserError(f"{place}: no history has an item of the training data")
    if left_out := len(histories) - len(vectors.ids):
        text = f"{place}: {left_out} histories without a known item left out"
        print(text, file=sys.stderr)
    write_vectors(vectors, path)
    print(path)
