"""Processes of their own, which answer lines of JSON; nothing here loads a model's library."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Late(Exception):
    """A process has not answered in time, and was ended."""


class Ended(Exception):
    """A process ended without an answer."""


class Child:
    """A module in a process of its own; it answers each line of JSON with another one.

    Args:
        module (str): what is run, with these arguments after it.
        python (str): the program that runs it.
    """

    def __init__(self, module: str, *arguments: str, python: str = sys.executable) -> None:
        import torch  # of the asking process; one that answers may do without

        threads = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            bufsize=0,
        )

    def ask(self, seconds: float, **values: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            Late: after so many seconds without one.
            Ended: if the process is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.process.poll() is not None:
            raise Ended(f"it ended with code {self.process.returncode}")
        try:
            self.process.stdin.write(json.dumps(values).encode() + b"\n")
        except BrokenPipeError:
            raise Ended(f"it ended with code {self.process.wait()}") from None
        ready, _, _ = select.select([self.process.stdout], [], [], max(seconds, 0))
        if not ready:
            self.close()
            raise Late
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"it ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def serve(answer: Callable[..., dict[str, Any]]) -> None:
    """Answer requests until there are no more; what is printed meanwhile goes to the errors."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)
