"""Atomic file writes, locks between processes, checksums."""

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
    """Hold the lock of a path within the block; other processes wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent / f".{path.name}.lock"):
        yield


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock file within the block.

    Args:
        path (Path): the lock file; created if it does not exist, its content is never changed.
        wait (bool): wait until another process releases the lock.

    Raises:
        BlockingIOError: if another process holds the lock and ``wait`` is false.
        UserError: if the file is a symbolic link, which may point anywhere.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a symbolic link; a lock must be a file. Remove it") from None
    try:
        # The system releases the lock, also when the process is killed.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(file)


def sweep(folder: Path, name: str = "") -> None:
    """Remove temporary folders of killed writers; those of running writers stay.

    Args:
        folder (Path): where to look.
        name (str): beginning of the name of the file that was being written; any by default.
    """
    for path in folder.iterdir():
        if path.name.startswith(f".{name}") and _TEMPORARY.search(path.name) and path.is_dir():
            # A running writer holds the lock.
            with suppress(OSError, UserError), locked(path / _LOCK, wait=False):
                shutil.rmtree(path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A locked new folder beside ``path``. Also safetensors writes a temporary file into it."""
    with ExitStack() as lock:
        while True:
            folder = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            with suppress(FileNotFoundError):  # removed by ``sweep`` before it was locked
                lock.enter_context(locked(Path(folder, _LOCK)))
                if os.path.exists(folder):
                    break
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary_path)``, flush to disk, and rename over ``path``.

    Temporary files that a killed process left for the same path are removed first.

    Args:
        path (Path): final path; its folder is created if needed.
        write (Callable): writes the whole file to the path it is given.

    Raises:
        OSError: naming ``path``, if it cannot be written; the old file is kept.
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
            os.chmod(name, 0o666 & ~umask)  # some writers create files that only the owner reads
            os.replace(name, path)
    except (OSError, SafetensorError) as error:
        cause = _cause(error)
        if cause is None:
            raise
        raise OSError(cause, os.strerror(cause), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        OSError: see ``write_atomically``.
    """
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _cause(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os error (\d+)", str(error))
    return int(match[1]) if match else None
