"""Exceptions of the package, and the message for memory that runs out."""

import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# How PyTorch (on CPU and GPU), cuBLAS and NumPy report it, and how many bytes they requested.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Unable to allocate|STATUS_ALLOC_FAILED"
)

_REQUESTED = re.compile(r"(?:[Tt]ried|Unable) to allocate ([\d.]+ \w+)")

_FREE = re.compile(r"of which ([\d.]+ \w+) is free")

LONGEST_MESSAGE = 2_000  # characters; a value may have millions


class UserError(ValueError):
    """A wrong key, value, file or checkpoint.

    The message says what was received, what is allowed and where to change it. A message longer
    than ``LONGEST_MESSAGE`` loses its middle part. The command line prints it without a traceback
    and exits with code 2.

    Args:
        message (str): the message.
        keys (Sequence): configuration keys that the message names, in order of appearance.
            ``Config.naming_origins`` appends where their values came from.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        self.keys = tuple(keys)
        if len(message) > LONGEST_MESSAGE:
            end = LONGEST_MESSAGE // 2
            message = f"{message[:end]} ... {message[-end:]}"
        super().__init__(message)


class OutOfMemory(RuntimeError):
    """Memory ran out. The message has the requested and the free bytes, and settings to reduce."""


@contextmanager
def explained_out_of_memory(config: Any, saved: Path | None = None) -> Iterator[None]:
    """Turn the out-of-memory errors of all libraries into ``OutOfMemory`` with one message.

    Args:
        config (Config): resolved configuration.
        saved (Path | None): path of the checkpoint with the last good state; named if it exists.

    Raises:
        OutOfMemory: if memory runs out within the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        known = isinstance(error, MemoryError) or _NO_MEMORY.search(text)
        if isinstance(error, OutOfMemory) or not known:
            raise
        requested, on_gpu = _REQUESTED.search(text), _FREE.search(text)
        free = on_gpu[1] if on_gpu else _available()
        keys = ["train_batch_size", "eval_batch_size", "MAX_ITEM_LIST_LENGTH"]
        keys += ["diffuasr_batch_size"] if "diffuasr_batch_size" in config else []
        message = (
            f"out of memory: {requested[1] if requested else 'an unknown number of bytes'} "
            f"requested, {free} free. Reduce {', '.join(f'{key}={config[key]}' for key in keys)}"
        )
        if saved and saved.is_file():
            message += f". {saved} holds the last good state"
        raise OutOfMemory(message) from error


def _available() -> str:
    """Bytes of main memory that this process can still allocate, as Linux counts them."""
    match = None
    with suppress(OSError):
        match = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if not match:
        return "an unknown number of bytes"
    free, limit = int(match[1]) * 1024, resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:  # ulimit -v
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        free = min(free, limit - pages * resource.getpagesize())
    return f"{free} bytes"


class ProcessLost(RuntimeError):
    """Another process of the run ended, or has not answered for ``TIMEOUT``."""


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite; the message names the part and the last good checkpoint."""


class Interrupted(Exception):
    """A signal stopped the run. Its state is saved in ``run_dir``.

    Attributes:
        signum (int): number of the signal.
        run_dir (Path): folder to resume from.
        same_command (bool): running the same command again continues; ``--resume`` is not needed.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(signum, run_dir)
        self.signum, self.run_dir, self.same_command = signum, run_dir, False
