"""Requests that wait for the model share one pass through it."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from recbole_simdiff.serving.service import Answer, Body

MOST = 64  # histories in one pass; a request of more has one of its own

# What each of several requests gets: answers, or the error that it is told.
AnswerAll = Callable[[Sequence[Body]], list[list[Answer] | Exception]]
_Waiting = tuple[Body, "asyncio.Future[list[Answer]]"]


class Queue:
    """Requests in the order in which they came, answered together by one thread.

    A request that finds the thread idle is answered alone and at once. Those that come while it
    works are answered next, together; so nobody waits for the sake of sharing.

    Args:
        answer_all (Callable): what answers; called in the thread, with requests of at most
            ``MOST`` histories.
    """

    def __init__(self, answer_all: AnswerAll) -> None:
        self._answer_all = answer_all
        # One thread: a model's own threads use the cores.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recommend")
        self._waiting: deque[_Waiting] = deque()
        self._work: asyncio.Task[None] | None = None

    async def answer(self, body: Body) -> list[Answer]:
        """The answers to a request.

        Raises:
            Exception: what ``answer_all`` gave for it, or raised.
        """
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((body, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._answer_waiting())
        return await future

    async def _answer_waiting(self) -> None:
        while self._waiting:
            taken = self._take()
            if taken:
                await self._answer(taken)

    def _take(self) -> list[_Waiting]:
        """The requests of the next pass, without those whose client has gone."""
        taken, n_histories = list[_Waiting](), 0
        while self._waiting:
            body, future = self._waiting[0]
            n = 0 if future.done() else len(body.requests or (body,))
            if taken and n_histories + n > MOST:
                break
            self._waiting.popleft()
            if n:
                taken.append((body, future))
                n_histories += n
        return taken

    async def _answer(self, taken: Sequence[_Waiting]) -> None:
        bodies, futures = zip(*taken, strict=True)
        loop, found = asyncio.get_running_loop(), list[list[Answer] | Exception]()
        try:
            found = await loop.run_in_executor(self._pool, self._answer_all, bodies)
        except Exception as error:  # a mistake in this package; the next requests are answered
            found = [error] * len(futures)
        for future, answers in zip(futures, found, strict=True):
            if future.done():
                continue
            if isinstance(answers, Exception):
                future.set_exception(answers)
            else:
                future.set_result(answers)
