"""Requests that wait together share one pass, and each gets what it would get alone."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff.errors import OutOfMemory, UserError
from recbole_simdiff.serving.recommender import Recommender

for library in ("pydantic", "prometheus_client"):
    pytest.importorskip(library, reason="the extra serve")

from recbole_simdiff.serving import queue as module  # noqa: E402
from recbole_simdiff.serving.queue import Queue  # noqa: E402
from recbole_simdiff.serving.service import Answer, Body, Limits, Service  # noqa: E402


class Slow:
    """Answers when it is told to, with one answer whose item is the k of the request."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, bodies: Sequence[Body]) -> list[list[Answer] | Exception]:
        assert self.go.wait(30)
        self.passes.append([body.k for body in bodies])
        if any(body.k == 99 for body in bodies):
            raise RuntimeError("a mistake of this package")
        return [
            UserError("seven")
            if body.k == 7
            else [Answer(items=[str(body.k)], scores=[0.0], unknown=[], fallback=False)]
            for body in bodies
        ]


async def ask(slow: Slow, ks: Sequence[int], cancelled: Sequence[int] = ()) -> list[Any]:
    """What requests get that all come while the first one is answered."""
    queue = Queue(slow)
    tasks = [asyncio.create_task(queue.answer(Body(items=["i1"], k=k))) for k in ks[:1]]
    await asyncio.sleep(0.05)
    tasks += [asyncio.create_task(queue.answer(Body(items=["i1"], k=k))) for k in ks[1:]]
    await asyncio.sleep(0)
    for number in cancelled:
        tasks[number].cancel()
    await asyncio.sleep(0)
    slow.go.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_those_that_come_meanwhile_are_answered_together() -> None:
    slow = Slow()
    found = asyncio.run(ask(slow, [1, 2, 7, 4, 5], cancelled=[3]))
    assert slow.passes == [[1], [2, 7, 5]]
    assert [one[0].items for one in (found[0], found[1], found[4])] == [["1"], ["2"], ["5"]]
    assert str(found[2]) == "seven"
    assert isinstance(found[3], asyncio.CancelledError)


def test_a_pass_has_a_limit_and_a_mistake_ends_none_but_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    slow = Slow()
    found = asyncio.run(ask(slow, [1, 2, 99, 4, 5, 6]))
    assert slow.passes == [[1], [2, 99], [4, 5], [6]]
    assert [isinstance(one, RuntimeError) for one in found] == [False, True, True, *[False] * 3]


def test_a_pass_is_limited_by_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the many histories of somebody else's request that came later."""
    monkeypatch.setattr(module, "MOST", 4)
    slow = Slow()
    sizes = [1, 1, 2, 2, 9, 1, 1]

    async def ask_many() -> None:
        queue = Queue(slow)
        tasks = []
        for k, size in enumerate(sizes, start=11):
            body = Body(requests=[{"items": ["i1"]}] * size, k=k)
            tasks.append(asyncio.create_task(queue.answer(body)))
            await asyncio.sleep(0.05)
        tasks[-2].cancel()
        await asyncio.sleep(0)
        slow.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask_many())
    assert slow.passes == [[11], [12, 13], [14], [15], [17]]


@pytest.fixture(scope="module")
def service(run_dir: Path) -> Service:
    return Service(run_dir, use_gpu=False, limits=Limits(k=12, histories=2))


BODIES: list[dict[str, Any]] = [
    {"items": ["i1", "i2"]},
    {"user": "a", "k": 3},
    {"items": ["i3", "zz"], "exclude": ["i4"], "allowed": ["i4", "i5", "i6"]},
    {"items": ["i3"], "seen": "keep", "k": 12},
    {"requests": [{"items": ["i1"], "allowed": ["i5", "i7"]}, {"user": "e"}], "allowed": ["i7"]},
    {"items": [], "fallback": "popular"},
    {"items": ["zz"]},
    {"user": "nobody"},
    {"items": ["i1"], "k": 13},
    {"requests": [{"items": ["i1"]}] * 3},
    {"items": ["i1"], "fallback": "none"},
]


def as_one(found: list[Answer] | Exception) -> Any:
    """Something to compare, without the scores: of one history they differ in the last bit."""
    if isinstance(found, Exception):
        return str(found)
    return [(one.items, one.unknown, one.fallback) for one in found]


def scores(found: Sequence[list[Answer] | Exception]) -> list[float]:
    """All scores of all answers."""
    return [s for part in found if isinstance(part, list) for one in part for s in one.scores]


def test_together_each_gets_what_it_gets_alone(service: Service, recommender: Recommender) -> None:
    bodies = [Body(**body) for body in BODIES]
    found, alone = service.answer_all(bodies), [service.answer_all([b])[0] for b in bodies]
    together = [as_one(one) for one in found]
    assert together == [as_one(one) for one in alone]
    assert scores(found) == pytest.approx(scores(alone), abs=1e-5)
    (wanted,) = recommender.recommend([["i1", "i2"]], k=10)
    assert together[0][0][0] == wanted.items
    assert together[2][0][0] in (["i5", "i6"], ["i6", "i5"])
    assert [one[0] for one in together[4]] == [["i7"], []]
    messages = [found for found in together if isinstance(found, str)]
    assert [text.split(";")[0].split(" in the")[0] for text in messages] == [
        "no history has an item of the training data",
        "user 'nobody' is not",
        "k=13 must be at most 12",
        "3 requests at once",
        "fallback='none' must be one of popular",
    ]


def test_alike_requests_share_one_call(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    recommend = Recommender.recommend

    def counted(self: Recommender, histories: Any, *given: Any) -> Any:
        calls.append(len(histories))
        return recommend(self, histories, *given)

    monkeypatch.setattr(Recommender, "recommend", counted)
    service.answer_all([Body(items=[f"i{i}"], exclude=[f"i{i + 1}"]) for i in range(1, 9)])
    assert calls == [8]


def test_what_one_of_them_causes_is_not_told_to_all(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommend = Recommender.recommend

    def failing(self: Recommender, histories: Any, *given: Any) -> Any:
        if any("i9" in request.items for request in histories):
            raise OutOfMemory("of i9")
        return recommend(self, histories, *given)

    monkeypatch.setattr(Recommender, "recommend", failing)
    found = service.answer_all([Body(items=[item]) for item in ("i1", "i9", "i2")])
    assert [isinstance(one, OutOfMemory) for one in found] == [False, True, False]
