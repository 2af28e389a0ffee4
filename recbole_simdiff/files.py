"""Files that are never half written, locks between processes, checksums."""

import ast
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from recbole_simdiff.errors import UserError

_TEMPORARY = re.compile(r"\.[a-z0-9_]{8}\.tmp$")  # how mkdtemp ends a name

_LOCK = "lock"  # in a temporary folder


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of names, types, shapes and values, on the CPU."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def outline(part: Any) -> str:
    """A syntax tree as text, the same on every version of Python; empty for imports and docstrings.

    Args:
        part (Any): an ``ast`` node, a list of them, or the value of a field.
    """
    if isinstance(part, list):
        return f"[{','.join(filter(None, map(outline, part)))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    text = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
    if text or isinstance(part, ast.Import | ast.ImportFrom):
        return ""
    fields = (f"{k}={outline(v)}" for k, v in ast.iter_fields(part) if v is not None and v != [])
    return f"{type(part).__name__}({','.join(fields)})"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Within the block no other process is in a block for the same path; each waits its turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f".{path.name}.lock"):
        yield


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Within the block no other process is in a block for the same lock file.

    Args:
        path (Path): the lock file, made if it is not there; its content stays as it is.
        wait (bool): for another process to leave its block.

    Raises:
        BlockingIOError: if another process is in its block, and ``wait`` is false.
        UserError: if the file is a symbolic link, which may point at anything.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a symbolic link; a lock must be a file. Remove it") from None
    try:
        # Given back by the system, also when the process is killed.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(file)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what killed writers left; what is being written stays.

    Args:
        folder (Path): where to look.
        name (str): of the file that it was to become; of any by default.
    """
    for path in folder.iterdir():
        if path.name.startswith(f".{name}") and _TEMPORARY.search(path.name) and path.is_dir():
            # A writer holds the lock to its end.
            with suppress(OSError, UserError), locked(path / _LOCK, wait=False):
                shutil.rmtree(path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A locked new folder beside ``path``; safetensors, too, makes a temporary file of its own."""
    with ExitStack() as lock:
        while True:
            folder = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            with suppress(FileNotFoundError):  # swept before it was locked
                lock.enter_context(locked(Path(folder, _LOCK)))
                if os.path.exists(folder):
                    break
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)``, flush to disk, and rename over ``path``.

    What a killed process left of the same file is removed first.

    Args:
        path (Path): final place; its folder is made if needed.
        write (Callable): writes the whole file at the path it is given.

    Raises:
        OSError: naming ``path``, if it cannot be written; the old file is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sweep(path.parent, f"{path.name}.")
        with _temporary(path) as folder:
            name = str(folder / path.name)
            write(name)
            with open(name, "rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)  # some writers make private files; a run is not
            os.replace(name, path)
    except (OSError, SafetensorError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise OSError(cause, os.strerror(cause), str(path)) from error


def _cause(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error, which safetensors only writes into its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
