"""The command that serves recommendations over HTTP."""

import argparse
import functools
import ipaddress
import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any

from recbole_simdiff.cli.parser import add_model_file
from recbole_simdiff.cli.recommend import add_filters, read_filters
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.models.registry import accept
from recbole_simdiff.serving.recommender import UnknownItems

TOKEN = "RECBOLE_SIMDIFF_TOKEN"


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of ``serve``."""
    parser.description = (
        "Serves POST /recommend, GET /items, /health and /metrics until SIGINT or SIGTERM. Needs "
        f"the extra serve. With a token, from --token_file or the environment variable {TOKEN}, "
        "every path but /health needs the header Authorization: Bearer TOKEN."
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run folder or file")
    add_model_file(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="default 8000; 0 for any that is free"
    )
    parser.add_argument("--token_file", metavar="FILE", help="file that holds the bearer token")
    add_filters(parser)
    numbers = (
        ("max_body_bytes", int, 2**20, "size of a body"),
        ("max_histories", int, 256, "histories of one request"),
        ("max_k", int, 1000, "items recommended to a history"),
        ("max_concurrent", int, 512, "connections and requests in work"),
        ("timeout", float, 10.0, "seconds for a body to arrive, and for an answer"),
        ("grace", float, 30.0, "seconds for requests in work after a signal to stop"),
        ("watch", float, 10.0, "seconds between looks for a newer checkpoint, 0 for none"),
    )
    for option, kind, default, text in numbers:
        parser.add_argument(
            f"--{option}", type=kind, default=default, metavar="N", help=f"{text} ({default:g})"
        )
    parser.add_argument("--use_gpu", choices=("true", "false"), default="true")


def handle(namespace: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Serve until told to stop."""
    if overrides:
        raise UserError(f"serve does not know --{next(iter(overrides))}; see serve --help")
    _check(namespace)
    try:
        from recbole_simdiff.serving.server import serve
        from recbole_simdiff.serving.service import Limits, Service
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'recbole_simdiff[serve]'") from None
    accept(namespace.model_file)
    token = _token(namespace.token_file)
    service = Service(
        namespace.checkpoint,
        functools.partial(read_filters, namespace),
        tuple(filter(None, (namespace.exclude, namespace.allowed))),
        namespace.fallback,
        Limits(
            namespace.max_body_bytes,
            namespace.timeout,
            namespace.max_histories,
            namespace.max_k,
            namespace.max_concurrent,
        ),
        namespace.use_gpu == "true",
        namespace.search,
    )
    with _listen(namespace.host, namespace.port) as listener:
        host, port = listener.getsockname()[:2]
        if token is None and not ipaddress.ip_address(host).is_loopback:
            logger.warning(f"--host={namespace.host} can be reached from outside without a token")
        print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownItems)  # the answers name them
            serve(service, listener, token, namespace.watch, namespace.grace)
    return 0


def _check(namespace: argparse.Namespace) -> None:
    """Refuse numbers that are out of range."""
    for option in ("max_body_bytes", "max_histories", "max_k", "max_concurrent", "timeout"):
        if not vars(namespace)[option] > 0:
            raise UserError(f"--{option}={vars(namespace)[option]} must be more than 0")
    for option in ("timeout", "grace", "watch"):
        if not math.isfinite(vars(namespace)[option]):
            raise UserError(f"--{option}={vars(namespace)[option]} must be a finite number")
    for option in ("grace", "watch"):
        if not vars(namespace)[option] >= 0:
            raise UserError(f"--{option}={vars(namespace)[option]} must be at least 0")
    if not 0 <= namespace.port < 2**16:
        raise UserError(f"--port={namespace.port} must be from 0 to {2**16 - 1}")


def _token(file: str | None) -> str | None:
    """The bearer token of the file or, without one, of the environment.

    Raises:
        UserError: if the file cannot be read, or the token is empty or has other than visible
            ASCII characters.
    """
    origin = f"--token_file={file}" if file else f"the environment variable {TOKEN}"
    try:
        text = Path(file).read_text(encoding="utf-8") if file else os.environ.get(TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} cannot be read: {error}") from None
    if text is None:
        return None
    token = text.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise UserError(f"{origin} must be a token of visible ASCII characters, without spaces")
    return token


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on --host={host} --port={port}: {error}") from None
