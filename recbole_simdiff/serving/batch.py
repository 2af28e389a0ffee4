"""Answers to many requests as files: in blocks, by several processes, and resumable."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from recbole_simdiff import files
from recbole_simdiff.errors import Interrupted, ProcessLost, UserError
from recbole_simdiff.log import logger
from recbole_simdiff.training.interrupt import StopRequest

BLOCK = 10_000  # requests of a part

MANIFEST = "parts.json"

_PART = re.compile(r"part-\d{6,}\.[a-z]+")  # names of parts; a manifest with others is foreign

T = TypeVar("T")


class Answers(NamedTuple):
    """The answers to a block.

    Attributes:
        text (str): what its part holds.
        unanswered (int): requests without a recommendation.
    """

    text: str
    unanswered: int


Answer = Callable[[Sequence[Any]], Answers]


class Totals(NamedTuple):
    """What the parts of a folder hold.

    Attributes:
        parts (int): number of files.
        kept (int): those of them that were there before.
        requests (int): number of requests.
        unanswered (int): requests without a recommendation.
    """

    parts: int
    kept: int
    requests: int
    unanswered: int


def blocks(requests: Iterable[T]) -> Iterator[list[T]]:
    """The requests in lists of ``BLOCK``; the last one may be shorter."""
    iterator = iter(requests)
    while block := list(islice(iterator, BLOCK)):
        yield block


def write_parts(
    requests: Iterable[Any],
    begin: Callable[[], Answer],
    folder: Path,
    settings: Mapping[str, Any],
    suffix: str,
    jobs: int,
) -> Totals:
    """Write the answers to a folder, one file a block: part-000000.<suffix> and so on.

    A part is written whole or not at all. One whose requests are those of an earlier start is kept.
    No more than two blocks for each process are in memory.

    Args:
        requests (Iterable): JSON can hold each of them.
        begin (Callable): makes what answers a block; called once in each process, to which it is
            pickled.
        folder (Path): where to write.
        settings (Mapping): what shapes the answers besides the requests, as JSON can hold it.
        suffix (str): of the files.
        jobs (int): number of processes; 1 is this one.

    Without requests the folder stays as it is.

    Raises:
        UserError: if the folder holds parts of other settings, or files that a part would replace,
            or another process writes there.
        Interrupted: after a signal; the same command goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = StopRequest()
    with _claimed(folder), stop.listen():
        manifest = _Manifest(folder, {**settings, "requests of a part": BLOCK})
        with _writer(begin, jobs) as write:
            _write_missing(requests, manifest, write, suffix, jobs, stop)
        return manifest.finish()


class _Manifest:
    """Which parts are written, of which requests and under which settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.kept = folder, 0
        self._path, self._settings = folder / MANIFEST, json.loads(json.dumps(settings))
        self._parts: dict[str, dict[str, Any]] = {}
        self._present: set[str] = set()
        if self._path.is_file():
            self._parts = self._read()
            return
        if any(_PART.fullmatch(path.name) for path in folder.iterdir()):
            raise UserError(
                f"{folder} holds parts, but no {MANIFEST} that says of what; give another --output"
            )
        self._save()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            settings, parts = dict(stored["settings"]), dict(stored["parts"])
            known = all(_PART.fullmatch(name) and _is_part(part) for name, part in parts.items())
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            known = False
        if not known:
            raise UserError(f"{self._path} is none of this program; give another --output")
        written = any(part["of"] for part in parts.values())
        for key in settings.keys() | self._settings.keys() if written else ():
            before, now = settings.get(key), self._settings.get(key)
            if before != now:
                raise UserError(
                    f"{self.folder} holds parts with {key}={before}, and now it is {now}; give "
                    "another --output, or delete it"
                )
        return parts

    def has(self, name: str, block: Sequence[Any]) -> bool:
        """Whether a part with the answers to this block is there; if so, it is kept."""
        self._present.add(name)
        found = self._parts.get(name, {}).get("of") == _digest(block)
        found = found and (self.folder / name).is_file()
        self.kept += found
        return found

    def begin(self, name: str) -> None:
        """Note a part that will be written: until then, what its file holds is not known."""
        self._parts[name] = _record("", 0, 0)
        self._save()

    def add(self, name: str, block: Sequence[Any], unanswered: int) -> None:
        """Note a part that was just written."""
        self._parts[name] = _record(_digest(block), len(block), unanswered)
        self._save()

    def finish(self) -> Totals:
        """Remove parts of requests that are no more, and count the others."""
        if not self._present:  # a mistake rather than a wish to have no parts
            return Totals(0, 0, 0, 0)
        for name in self._parts.keys() - self._present:
            (self.folder / name).unlink(missing_ok=True)
            del self._parts[name]
        self._save()
        parts = self._parts.values()
        sums = (sum(part[key] for part in parts) for key in ("requests", "unanswered"))
        return Totals(len(parts), self.kept, *sums)

    def _save(self) -> None:
        content = {"settings": self._settings, "parts": dict(sorted(self._parts.items()))}
        files.write_text(self._path, json.dumps(content, indent=1) + "\n")


def _record(of: str, requests: int, unanswered: int) -> dict[str, Any]:
    """What a manifest says of a part; ``of`` is empty until it is written."""
    return {"of": of, "requests": requests, "unanswered": unanswered}


def _is_part(stored: Any) -> bool:
    """Whether a manifest may say this of a part."""
    like = _record("", 0, 0)
    return {k: type(v) for k, v in stored.items()} == {k: type(v) for k, v in like.items()}


def _digest(block: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(block).encode(), digest_size=16).hexdigest()


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    try:
        with files.locked(folder / ".lock", wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another process writes to {folder}; wait for it, or stop it") from None


def _write_missing(
    requests: Iterable[Any],
    manifest: _Manifest,
    write: Callable[[Path, Sequence[Any]], Future[int]],
    suffix: str,
    jobs: int,
    stop: StopRequest,
) -> None:
    """Write the parts that are not there, at most two of each process at a time."""
    under_way: dict[Future[int], tuple[str, list[Any]]] = {}

    def note(most: int) -> None:
        while len(under_way) > most:
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                name, block = under_way.pop(done)
                manifest.add(name, block, done.result())
                logger.info(f"{name}: {len(block):,} histories")

    for number, block in enumerate(blocks(requests)):
        name = f"part-{number:06d}.{suffix}"
        if not manifest.has(name, block):
            manifest.begin(name)
            under_way[write(manifest.folder / name, block)] = (name, block)
            note(0 if jobs == 1 else 2 * jobs - 1)
        if stop.signum is not None:
            break
    note(0)
    if stop.signum is not None:
        interrupted = Interrupted(stop.signum, manifest.folder)
        interrupted.same_command = True
        raise interrupted


@contextmanager
def _writer(
    begin: Callable[[], Answer], jobs: int
) -> Iterator[Callable[[Path, Sequence[Any]], Future[int]]]:
    """What writes a part: (path, block) -> the number of requests without a recommendation."""
    if jobs == 1:
        answer = begin()

        def write(path: Path, block: Sequence[Any]) -> Future[int]:
            done: Future[int] = Future()
            done.set_result(_write(answer, path, block))
            return done

        yield write
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(jobs, context, _begin, (begin, threads)) as pool:
        try:
            yield lambda path, block: pool.submit(_write_here, path, block)
        except BrokenProcessPool:
            raise ProcessLost(
                "a process has ended, perhaps for lack of memory; the same command goes on, with "
                "fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_answer: Answer | None = None  # of a process of the pool


def _begin(begin: Callable[[], Answer], threads: int) -> None:
    global _answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it, too, and waits
    torch.set_num_threads(threads)
    _answer = begin()


def _write_here(path: Path, block: Sequence[Any]) -> int:
    assert _answer is not None
    return _write(_answer, path, block)


def _write(answer: Answer, path: Path, block: Sequence[Any]) -> int:
    text, unanswered = answer(block)
    files.write_text(path, text)
    return unanswered
