"""Checkpoints: one safetensors file that holds tensors and JSON, replaced atomically.

A single file cannot be half old and half new, and one rename publishes it; tensors and the plain
values that belong to them cannot come apart. Loading reads tensors and JSON only, so a file from
anywhere is safe to open.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recbole_simdiff.errors import UserError

FORMAT = "recbole_simdiff checkpoint 1"
_CONTENT = "content.json"
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


@contextmanager
def turn(path: Path) -> Iterator[None]:
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


def save(path: Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write a checkpoint; a crash leaves either the old file or the new one.

    Args:
        path (Path): file to write or replace.
        tensors (Mapping): name -> tensor; copied to the CPU.
        content (Mapping): JSON-ready values.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # As bytes in a tensor: the header of a safetensors file is limited to 100 MB.
    text = json.dumps(content).encode()
    plain[_CONTENT] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    header = {"format": FORMAT, "digest": digest(plain)}
    write_atomically(path, lambda name: save_file(plain, name, metadata=header))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and JSON content of a checkpoint. Never unpickles.

    Raises:
        UserError: if the file is missing, damaged, or not a checkpoint of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist; give a .safetensors file of a run")
    try:
        with open(path, "rb"):  # safetensors would not say why it cannot
            pass
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT!r} (it says {header.get('format')!r})")
        if header.get("digest") != digest(tensors):
            raise UserError(
                f"checkpoint {path} is damaged: its checksum does not match its content"
            )
        content: dict[str, Any] = json.loads(tensors.pop(_CONTENT).numpy().tobytes())
    except PermissionError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None
    except (SafetensorError, KeyError, ValueError, OSError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a readable checkpoint ({error}). Checkpoints are safetensors files; "
            "pickled .pth files are never opened"
        ) from None
    if not isinstance(content, dict):
        raise foreign(path, f"its content is a {type(content).__name__}")
    return tensors, content


def foreign(path: Path, what: str) -> UserError:
    """The refusal of a checkpoint whose content is not what this version writes."""
    return UserError(f"{path} is not a checkpoint of this version: {what}")


def find(place: str | Path, name: str) -> Path:
    """The checkpoint file meant by ``place``: the file itself, or ``name`` inside a run folder.

    Args:
        place (str | Path): a .safetensors file or a run folder.
        name (str): ``best.safetensors`` or ``last.safetensors``.

    Raises:
        UserError: if there is no such file.
    """
    place = Path(place)
    path = place / name if place.is_dir() else place
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}; give a run folder that holds {name}, or a .safetensors file"
        )
    return path


def split(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with ``prefix.``, under the rest of their name."""
    start = len(prefix) + 1
    return {name[start:]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
