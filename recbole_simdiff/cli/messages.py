"""Messages on standard error, and escaping of text for the terminal."""

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

USER_FIXABLE = (  # errors of the system that the user can fix
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)

# Control characters, line separators, marks of the writing direction, surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text for a terminal: control characters are shown as escapes, such as ``\\x1b``."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def print_error(text: str) -> None:
    """Print a message to standard error, if its terminal still exists."""
    with contextlib.suppress(OSError):
        print("\n".join(map(printable, text.split("\n"))), file=sys.stderr)


def discard_output(*streams: TextIO) -> None:
    """Discard the buffered output of streams that cannot be written."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # no file, or closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def system_message(error: OSError | SafetensorError) -> str:
    """Message for an error of the system: the file, the reason, and what to do."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    path = os.fsdecode(error.filename or "standard output")
    text = f"{path}: {error.strerror}"
    if error.errno in FULL:
        from recbole_simdiff.checkpoint import LAST  # here, because it imports torch

        text += "; free disk space there"
        folder = os.path.dirname(path)
        if folder and os.path.isfile(os.path.join(folder, LAST)):
            command = f"{program()} --resume={shlex.quote(folder)}"
            text += f". Continue the run from its last saved state with {command}"
    elif error.errno in USER_FIXABLE:
        text += "; make it readable and writable, or give another path"
    return text


def program() -> str:
    """The command that starts this program: the installed one, or the script with its path."""
    path = Path(sys.argv[0])
    if path.name == "recbole-simdiff":
        return path.name
    script = "run_recbole_simdiff.py"
    return f"python {shlex.quote(sys.argv[0]) if path.name == script else script}"
