"""What the program says on standard error, and how it is made fit for a terminal."""

import contextlib
import errno
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)

MENDABLE = (  # by the user
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)

# Control characters, line separators, marks that turn the direction of writing, half characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a terminal: what would steer it is written as an escape, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell(text: str) -> None:
    """Say something on standard error, which may be a terminal that is gone."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def abandon(*streams: TextIO) -> None:
    """Let what is left in streams that cannot be written go nowhere when the program ends."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # no file, or closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def system_message(error: OSError | SafetensorError) -> str:
    """What the system refused, where, and what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    place = os.fsdecode(error.filename or "standard output")
    text = f"{place}: {error.strerror}"
    if error.errno in FULL:
        from recbole_simdiff.checkpoint import LAST  # after torch, which takes its time

        text += "; make room there"
        folder = os.path.dirname(place)
        if folder and os.path.isfile(os.path.join(folder, LAST)):
            again = f"{program()} --resume={shlex.quote(folder)}"
            text += f". The run goes on from its last saved state with {again}"
    elif error.errno in MENDABLE:
        text += "; see that it can be read and written, or name another place"
    return text


def program() -> str:
    """How this program was called: as the installed command, or as a script of some folder."""
    called = Path(sys.argv[0])
    if called.name == "recbole-simdiff":
        return called.name
    script = "run_recbole_simdiff.py"
    return f"python {shlex.quote(sys.argv[0]) if called.name == script else script}"
