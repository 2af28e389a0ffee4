"""What a server answers with: the current model, its replacement by a newer one, the numbers."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from recbole_simdiff import checkpoint
from recbole_simdiff.checkpoint import BEST
from recbole_simdiff.errors import UserError
from recbole_simdiff.log import logger
from recbole_simdiff.serving.recommender import Recommendation, Recommender, Request, load

Id = StrictStr | StrictInt

# Reads the ids that are excluded and allowed for all requests, and says what is wrong with them.
ReadFilters = Callable[[Recommender], tuple[list[str], list[str] | None]]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body_bytes (int): size of a body.
        seconds (float): until a body has arrived, and until an answer is computed.
        histories (int): in one request.
        k (int): items recommended to a history.
        concurrent (int): connections and requests in work; more are answered 503.
    """

    body_bytes: int = 2**20
    seconds: float = 10.0
    histories: int = 256
    k: int = 1000
    concurrent: int = 512


class Query(BaseModel):
    """Whom to recommend to: a history of item ids, or a user of the training data set."""

    model_config = ConfigDict(extra="forbid")

    items: list[Id] | None = None
    user: Id | None = None
    exclude: list[Id] = []
    allowed: list[Id] | None = None


class Body(Query):
    """One query, or several as ``requests``; then the filters beside them hold for all."""

    requests: Annotated[list[Query], Field(min_length=1)] | None = None
    k: int = Field(10, ge=1)
    seen: str = Field("drop", pattern="^(drop|keep)$")
    fallback: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> "Body":
        if [self.items, self.user, self.requests].count(None) != 2:
            raise ValueError("give one of items, user and requests")
        for query in self.requests or ():
            if (query.items is None) == (query.user is None):
                raise ValueError("each of requests must have either items or user")
        return self


class Answer(BaseModel):
    """Recommendations for one query; see ``Recommendation``.

    Attributes:
        fallback (bool): no item of the history is known, and the fallback was given.
    """

    items: list[str]
    scores: list[float]
    unknown: list[str]
    fallback: bool


class Answers(BaseModel):
    """Recommendations for several queries, in their order."""

    answers: list[Answer]


class Metrics:
    """Numbers for Prometheus, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "simdiff_requests", "Answered requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "simdiff_request_seconds",
            "Time to answer a request",
            ["path"],
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
        )
        self.in_progress = Gauge(
            "simdiff_requests_in_progress", "Requests in work", registry=self.registry
        )
        self.histories = Counter(
            "simdiff_histories",
            "Histories answered by the model, by the fallback, or with nothing",
            ["by"],
            registry=self.registry,
        )
        self.reloads = Counter(
            "simdiff_reloads",
            "Checkpoints loaded while serving",
            ["result"],
            registry=self.registry,
        )
        self.loaded = Gauge(
            "simdiff_model_loaded_timestamp_seconds",
            "When the model was loaded",
            registry=self.registry,
        )


class Model(NamedTuple):
    """A loaded checkpoint and what is served with it.

    Attributes:
        recommender (Recommender): the model.
        exclude (list): item ids that are recommended to nobody.
        allowed (list | None): item ids of which alone recommendations are chosen.
        number (int): how many models were loaded before.
        loaded (float): when, in seconds since 1970.
    """

    recommender: Recommender
    exclude: list[str]
    allowed: list[str] | None
    number: int
    loaded: float


class Service:
    """The model that answers, replaced when a newer checkpoint is there.

    Args:
        place (str | Path): a run folder (its best epoch) or a checkpoint file.
        read_filters (Callable): ids excluded and allowed for all requests; called for each model.
        watched (Sequence): files beside the checkpoint that make a new model when they change.
        fallback (str | None): for requests that do not name one.
        limits (Limits): what a request may ask for.
        use_gpu (bool): use a GPU where there is one.
        search (str): exact or approximate, see ``load``.

    Attributes:
        model (Model): the current one. A request takes it once, so that a new one does not change
            what is being answered.
        metrics (Metrics): the numbers.

    Raises:
        UserError: if the checkpoint or a filter cannot be used.
    """

    def __init__(
        self,
        place: str | Path,
        read_filters: ReadFilters = lambda recommender: ([], None),
        watched: tuple[str, ...] = (),
        fallback: str | None = None,
        limits: Limits | None = None,
        use_gpu: bool = True,
        search: str = "exact",
    ) -> None:
        self.place, self.fallback, self.use_gpu, self.search = place, fallback, use_gpu, search
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._read_filters, self._watched = read_filters, watched
        checkpoint.resolve(place, BEST)  # a missing checkpoint is an error only at the start
        self._signature: list[tuple[int, int, int] | None] = []
        self._signature = self._files()
        self.model = self._load(0)

    def answer_all(self, bodies: Sequence[Body]) -> list[list[Answer] | Exception]:
        """What each of several requests gets: an answer to each of its queries, or its error.

        Those with the same options share the model's work. The errors are ``UserError`` for a
        request that asks for what there is not, or no history of which has a known item where
        there is no fallback; ``TrainingDiverged`` if a score is NaN; ``OutOfMemory``.

        Args:
            bodies (Sequence): the requests.
        """
        model, found = self.model, dict[int, list[Answer] | Exception]()
        alike: dict[tuple[int, str, str | None], dict[int, list[Request]]] = {}
        for number, body in enumerate(bodies):
            fallback = body.fallback if body.fallback is not None else self.fallback
            try:
                requests = self._requests(body, model)
            except UserError as error:
                found[number] = error
            else:
                alike.setdefault((body.k, body.seen, fallback), {})[number] = requests
        for options, group in alike.items():
            found |= self._answer_alike(model, group, *options)
        return [found[number] for number in range(len(bodies))]

    def _requests(self, body: Body, model: Model) -> list[Request]:
        """The queries of a request, within the limits, with the filters beside them."""
        queries = body.requests or [Query(items=body.items, user=body.user)]
        if len(queries) > self.limits.histories:
            raise UserError(f"{len(queries)} requests at once; at most {self.limits.histories}")
        if body.k > self.limits.k:
            raise UserError(f"k={body.k} must be at most {self.limits.k}")
        return [_request(query, body, model.recommender) for query in queries]

    def _answer_alike(
        self,
        model: Model,
        group: Mapping[int, list[Request]],
        k: int,
        seen: str,
        fallback: str | None,
    ) -> dict[int, list[Answer] | Exception]:
        """Number of each request -> its answers, or its error."""
        requests = [request for part in group.values() for request in part]
        try:
            ranked = iter(
                model.recommender.recommend(
                    requests, k, seen == "drop", model.exclude, model.allowed, fallback
                )
            )
        except Exception as error:
            if len(group) == 1:
                return dict.fromkeys(group, error)
            found: dict[int, list[Answer] | Exception] = {}
            for number, part in group.items():  # what one of them caused is not told to all
                found |= self._answer_alike(model, {number: part}, k, seen, fallback)
            return found
        return {
            number: self._answers(part, list(islice(ranked, len(part))), fallback)
            for number, part in group.items()
        }

    def _answers(
        self, requests: list[Request], ranked: list[Recommendation], fallback: str | None
    ) -> list[Answer] | UserError:
        """The answers to one request."""
        without = [
            len(one.unknown) == len(request.items)
            for one, request in zip(ranked, requests, strict=True)
        ]
        if all(without) and fallback is None:
            return UserError(
                "no history has an item of the training data; give other items, or "
                "fallback='popular'"
            )
        return [self._answer(*pair, fallback) for pair in zip(ranked, without, strict=True)]

    def reload_if_changed(self) -> bool:
        """Take a newer checkpoint, or newer filters, if there are any; keep the old ones if not.

        Returns:
            bool: whether there is a new model. What cannot be used is logged and counted, and
                tried again when the files change again.
        """
        signature = self._files()
        if signature == self._signature:
            return False
        self._signature = signature
        try:
            self.model = self._load(self.model.number + 1)
        except Exception as error:  # whatever it is, the old model still answers
            logger.warning(f"the newer checkpoint is not used: {error}")
            self.metrics.reloads.labels("failed").inc()
            return False
        logger.info(f"loaded a newer checkpoint, number {self.model.number}")
        self.metrics.reloads.labels("done").inc()
        return True

    def _load(self, number: int) -> Model:
        recommender = load(self.place, self.use_gpu, search=self.search)
        exclude, allowed = self._read_filters(recommender)
        recommender.recommend(
            [recommender.item_ids[1:2]], 1, fallback=self.fallback
        )  # a model that cannot recommend is refused here
        model = Model(recommender, exclude, allowed, number, time.time())
        self.metrics.loaded.set(model.loaded)
        return model

    def _files(self) -> list[tuple[int, int, int] | None]:
        """What tells a file from the one that had its name before."""
        found: list[tuple[int, int, int] | None] = []
        try:
            paths = [checkpoint.resolve(self.place, BEST), *map(Path, self._watched)]
        except (OSError, UserError):  # gone for the moment, or for good
            return self._signature
        for path in paths:
            try:
                state = path.stat()
                found.append((state.st_ino, state.st_mtime_ns, state.st_size))
            except OSError:
                found.append(None)
        return found

    def _answer(self, one: Recommendation, without: bool, fallback: str | None) -> Answer:
        fallen = without and fallback is not None
        by = "fallback" if fallen else "nothing" if without else "model"
        self.metrics.histories.labels(by).inc()
        return Answer(items=one.items, scores=one.scores, unknown=one.unknown, fallback=fallen)


def _request(query: Query, body: Body, recommender: Recommender) -> Request:
    """A query as the recommender takes it, with its filters and those beside all queries."""
    user = query.user
    items = (
        recommender.history(str(user)) if user is not None else list(map(str, query.items or ()))
    )
    lists = [set(map(str, ids)) for ids in (query.allowed, body.allowed) if ids is not None]
    allowed = set.intersection(*lists) if lists else None
    exclude = [*query.exclude, *body.exclude]
    return Request(items, list(map(str, exclude)), allowed)
