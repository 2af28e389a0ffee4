"""The logger of this package, and where its messages go.

Whoever imports the package configures logging; without any, warnings reach standard error, as
Python has it. The command line shows more, with ``terminal``. A run adds a file of its own and
leaves the handlers that are there alone. RecBole writes to the root logger, so handlers are added
there: they get the messages of both.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("recbole_simdiff")


class _Terminal(logging.Handler):
    """Writes to what standard error is when a message comes, not when the handler is made."""

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
    """Within the block, less than ``level`` is not logged; within ``terminal`` by RecBole, too.

    Args:
        level (str): name of the level, e.g. INFO.
    """
    root = logging.getLogger()
    ours = any(isinstance(handler, _Terminal) for handler in root.handlers)
    before = {one: one.level for one in ((logger, root) if ours else (logger,))}
    for one in before:
        one.setLevel(level)
    try:
        yield
    finally:
        for one, value in before.items():
            one.setLevel(value)


@contextmanager
def also_to(handler: logging.Handler) -> Iterator[None]:
    """Within the block, messages of this package and of RecBole go to the handler, too."""
    root = logging.getLogger()
    added = [handler]
    if not logger.hasHandlers() and logging.lastResort:  # which only counts where there is no other
        added.append(logging.lastResort)
    # In front, because RecBole calls its TensorBoard folder as the file of the first handler.
    root.handlers[:0] = added
    try:
        yield
    finally:
        for one in added:
            root.removeHandler(one)
        handler.close()
