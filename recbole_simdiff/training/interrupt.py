"""Signals that ask a training to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from recbole_simdiff import distributed
from recbole_simdiff.errors import Interrupted


class StopRequest:
    """SIGINT, SIGTERM or SIGHUP as a request that loops honour where their state can be saved.

    SIGHUP counts unless the caller has it ignored, as ``nohup`` does.

    Attributes:
        signum (int | None): the signal that came.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._listening = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Take note of the first signal within the block; a second one is final.

        But for SIGHUP: one that hangs up sends it twice, as shell and as terminal.
        """
        if self._listening:
            yield
            return
        self._listening = True
        before: dict[int, Any] = {}

        def ask(signum: int, frame: FrameType | None) -> None:
            self.signum = signum
            for number, handler in before.items():
                if number != signal.SIGHUP:
                    signal.signal(number, handler)

        try:
            for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if asked != signal.SIGHUP or signal.getsignal(asked) != signal.SIG_IGN:
                    before[asked] = signal.signal(asked, ask)
        except ValueError:  # not in the main thread: the caller owns the signals
            before.clear()
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self, run_dir: Path) -> None:
        """Honour a request, whichever process it came to.

        Raises:
            Interrupted: if one came.
        """
        signum = distributed.all_reduce_max(self.signum or 0)
        if signum:
            self.signum = None
            raise Interrupted(signum, run_dir)
