"""Mistakes that the user can mend, and memory that runs out."""

import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# How PyTorch (on CPU and GPU), cuBLAS and NumPy say it, and what they asked for.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Unable to allocate|STATUS_ALLOC_FAILED"
)

_ASKED = re.compile(r"(?:[Tt]ried|Unable) to allocate ([\d.]+ \w+)")

_FREE = re.compile(r"of which ([\d.]+ \w+) is free")

LONGEST_MESSAGE = 2_000  # characters; a value may have millions


class UserError(ValueError):
    """A wrong key, value, file or checkpoint.

    The message says what was received, what is allowed and where to change it; of a long one the
    middle is left out. The command line prints it without a traceback and exits with code 2.

    Args:
        message (str): the message.
        keys (Sequence): keys of the configuration that it is about, in order of appearance. Where
            their values came from is added by ``Config.naming_origins``.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        self.keys = tuple(keys)
        if len(message) > LONGEST_MESSAGE:
            end = LONGEST_MESSAGE // 2
            message = f"{message[:end]} ... {message[-end:]}"
        super().__init__(message)


class OutOfMemory(RuntimeError):
    """The message says what was asked for, what is free, and which settings need less."""


@contextmanager
def telling_memory(config: Any, saved: Path | None = None) -> Iterator[None]:
    """Turn what a library says when memory runs out into one message.

    Args:
        config (Config): resolved configuration.
        saved (Path | None): checkpoint with the last good state, if there may be one.

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
        asked, on_gpu = _ASKED.search(text), _FREE.search(text)
        free = on_gpu[1] if on_gpu else _available()
        keys = ["train_batch_size", "eval_batch_size", "MAX_ITEM_LIST_LENGTH"]
        keys += ["diffuasr_batch_size"] if "diffuasr_batch_size" in config else []
        message = (
            f"out of memory: {asked[1] if asked else 'an unknown number of bytes'} asked for, "
            f"{free} free. Smaller {', '.join(f'{key}={config[key]}' for key in keys)} need less"
        )
        if saved and saved.is_file():
            message += f". {saved} holds the last good state"
        raise OutOfMemory(message) from error


def _available() -> str:
    """Bytes of main memory that this process can have, as Linux counts them."""
    found = None
    with suppress(OSError):
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    if not found:
        return "an unknown number of bytes"
    free, limit = int(found[1]) * 1024, resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:  # ulimit -v
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        free = min(free, limit - pages * resource.getpagesize())
    return f"{free} bytes"


class ProcessLost(RuntimeError):
    """Another process of the run ended, or has not answered for ``TIMEOUT``."""


class TrainingDiverged(RuntimeError):
    """A loss became NaN or infinite; the message names the part and the last good checkpoint."""


class Interrupted(Exception):
    """A signal asked to stop; the state is saved in ``run_dir``.

    Attributes:
        signum (int): number of the signal.
        run_dir (Path): folder to resume from.
        same_command (bool): the command that was stopped continues by itself when run again.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(signum, run_dir)
        self.signum, self.run_dir, self.same_command = signum, run_dir, False
