"""What a data set was made from: a JSON file beside its atomic files."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_simdiff.files import write_atomically


def manifest_path(inter: Path) -> Path:
    """The manifest of an ``.inter`` file."""
    return inter.with_suffix(".manifest.json")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(path: Path, kind: str) -> dict[str, Any]:
    """A source as the manifest has it: path, size in bytes, checksum, and what it was read as."""
    size = path.stat().st_size
    return {"path": str(path), "bytes": size, "sha256": sha256(path), "read_as": kind}


def write_files(
    frames: Mapping[Path, pd.DataFrame],
    write: Callable[[pd.DataFrame, str], None],
    content: Mapping[str, Any],
) -> None:
    """Write atomic files and their manifest: all are replaced, or none.

    A failure may come while any of them is written; the first file is put in place last.

    Args:
        frames (Mapping): path -> table; the first is the ``.inter`` file.
        write (Callable): writes a table to a path.
        content (Mapping): of the manifest, to which name and SHA-256 of each file are added.

    Raises:
        OSError: if one cannot be written; the old ones are still there.
    """
    checksums: dict[str, str] = {}

    def write_rest(left: list[Path]) -> None:
        if left:
            write_atomically(left[0], lambda name: write_one(name, left))
        else:
            text = json.dumps({**content, "files": checksums}, indent=2, ensure_ascii=False)
            write_atomically(place, lambda name: Path(name).write_text(text + "\n", "utf-8"))

    def write_one(name: str, left: list[Path]) -> None:
        write(frames[left[0]], name)
        checksums[left[0].name] = sha256(name)
        write_rest(left[1:])

    place = manifest_path(next(iter(frames)))
    write_rest([*frames])
