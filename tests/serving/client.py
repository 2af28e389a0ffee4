"""A server in a process of its own, and what its clients do."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx


class Running(NamedTuple):
    """A server.

    Attributes:
        url (str): where it listens.
        process (Popen): its process; standard error is a pipe.
    """

    url: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def running(run_dir: Path, *given: str, **environment: str) -> Iterator[Running]:
    """Within the block, the command serves a run on a free port."""
    command = [sys.executable, "-m", "recbole_simdiff", "serve", f"--checkpoint={run_dir}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--use_gpu=false", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), process.communicate()[1]
        yield Running(line.split()[-1], process)
    finally:
        process.kill()
        process.communicate()


class Load(NamedTuple):
    """What a load of requests met.

    Attributes:
        answers (list): status and JSON of each request, in order; None for one that was lost.
        seconds (list): until each was answered.
        total (float): seconds of all.
    """

    answers: list[tuple[int, Any] | None]
    seconds: list[float]
    total: float


async def send(url: str, bodies: Sequence[Any], connections: int) -> Load:
    """POST each body to /recommend over that many connections, each of them busy all the time."""
    answers: list[tuple[int, Any] | None] = [None] * len(bodies)
    seconds = [float("nan")] * len(bodies)
    waiting = iter(enumerate(bodies))

    async def work() -> None:
        # A client each: one pool of many connections costs more than the requests.
        async with httpx.AsyncClient(timeout=60) as client:
            for number, body in waiting:
                begin = time.perf_counter()
                with contextlib.suppress(httpx.HTTPError):
                    response = await client.post(f"{url}/recommend", json=body)
                    answers[number] = (response.status_code, response.json())
                seconds[number] = time.perf_counter() - begin

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(connections)))
    return Load(answers, seconds, time.perf_counter() - begin)
