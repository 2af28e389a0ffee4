"""The logger of this package, and where its messages go.

A program that imports the package configures logging itself. Without configuration, Python writes
warnings to standard error. The command line shows more, with ``terminal``. A run adds a log file
and does not change existing handlers. RecBole writes to the root logger, so handlers are added
there: they receive the messages of both.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("recbole_simdiff")


class _Terminal(logging.Handler):
    """Writes each message to what ``sys.stderr`` is at that time, also after a redirection."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except RecursionError:
            raise
        except Exception:
            self.handleError(record)


@contextmanager
def terminal() -> Iterator[None]:
    """Within the block, messages of this package and of RecBole go to standard error, from INFO."""
    root, handler = logging.getLogger(), _Terminal()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


@contextmanager
def at_level(level: str) -> Iterator[None]:
    """Within the block, messages below ``level`` are not logged.

    Inside ``terminal`` this also holds for RecBole's messages.

    Args:
        level (str): name of the level, e.g. INFO.
    """
    root = logging.getLogger()
    in_terminal = any(isinstance(handler, _Terminal) for handler in root.handlers)
    levels = {each: each.level for each in ((logger, root) if in_terminal else (logger,))}
    for each in levels:
        each.setLevel(level)
    try:
        yield
    finally:
        for each, original in levels.items():
            each.setLevel(original)


@contextmanager
def also_to(handler: logging.Handler) -> Iterator[None]:
    """Within the block, the handler also receives the messages of this package and of RecBole."""
    root = logging.getLogger()
    added = [handler]
    if not logger.hasHandlers() and logging.lastResort:  # Python uses it only without any handler
        added.append(logging.lastResort)
    # In front: RecBole names its TensorBoard folder after the file of the first handler.
    root.handlers[:0] = added
    try:
        yield
    finally:
        for each in added:
            root.removeHandler(each)
        handler.close()
