"""An HTTP server of recommendations: FastAPI for the paths, uvicorn for the connections."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from recbole_simdiff.errors import OutOfMemory, UserError
from recbole_simdiff.serving.guard import Guard
from recbole_simdiff.serving.queue import Queue
from recbole_simdiff.serving.service import Answer, Answers, Body, Service
from recbole_simdiff.version import __version__

PAGE = 10_000  # most items of one answer of /items


def build_app(service: Service, token: str | None = None) -> FastAPI:
    """The application: POST /recommend, GET /items, /health and /metrics.

    Args:
        service (Service): what answers.
        token (str | None): the bearer token that every path but ``/health`` needs.
    """
    app = FastAPI(title="recbole_simdiff", version=__version__, docs_url=None, redoc_url=None)
    queue = Queue(service.answer_all)

    @app.post("/recommend")
    async def recommend(body: Body) -> Answer | Answers:
        """The best next items for one history or user, or for several as ``requests``."""
        try:
            answers = await asyncio.wait_for(queue.answer(body), service.limits.seconds)
        except TimeoutError:
            text = f"no answer within {service.limits.seconds:g} seconds; the server is busy"
            raise HTTPException(503, text) from None
        return answers[0] if body.requests is None else Answers(answers=answers)

    @app.get("/items")
    async def items(
        offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=PAGE)] = 100
    ) -> dict[str, Any]:
        """Ids and titles of the items that can be recommended, in the order of the item table."""
        known = service.model.recommender
        ids = known.item_ids[1 + offset : 1 + offset + limit]
        rows = [{"id": item, "title": known.titles.get(item)} for item in ids]
        return {"n_items": len(known.item_ids) - 1, "offset": offset, "items": rows}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """That the server answers, and with what."""
        model = service.model
        config = model.recommender.config
        return {
            "status": "ok",
            "version": __version__,
            "model": config.name,
            "dataset": config["dataset"],
            "n_items": len(model.recommender.item_ids) - 1,
            "number": model.number,
            "loaded": model.loaded,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Numbers as Prometheus reads them."""
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    _add_error_handlers(app)
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, token=token)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Answer mistakes with a status and one text."""

    @app.exception_handler(UserError)
    async def mistake(request: Request, error: UserError) -> Response:
        return _told(422, str(error))

    @app.exception_handler(OutOfMemory)
    async def no_memory(request: Request, error: OutOfMemory) -> Response:
        return _told(503, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The default repeats the input, which may be large, or no JSON.
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return _told(422, f"{place[:200]}: {first['msg'][:500]}")


def _told(status: int, text: str) -> Response:
    text = text.encode("utf-8", "backslashreplace").decode()  # an id may be half a character
    return JSONResponse({"detail": text}, status)


class _Server(uvicorn.Server):
    """Ends in peace when told to stop: requests in work are answered, then ``serve`` returns."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, and do not raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


def serve(
    service: Service,
    listener: socket.socket,
    token: str | None = None,
    watch: float = 10.0,
    grace: float = 30.0,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        service (Service): what answers.
        listener (socket): where; bound and listening.
        token (str | None): the bearer token that every path but ``/health`` needs.
        watch (float): seconds between two looks for a newer checkpoint; 0 for none.
        grace (float): seconds that requests in work get after the signal.
    """
    settings = uvicorn.Config(
        build_app(service, token),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=service.limits.concurrent,
        timeout_graceful_shutdown=round(grace),
    )
    asyncio.run(_serve(_Server(settings), service, listener, watch))


async def _serve(server: _Server, service: Service, listener: socket.socket, watch: float) -> None:
    watching = asyncio.create_task(_watch(service, watch)) if watch else None
    await server.serve(sockets=[listener])
    if watching:
        watching.cancel()


async def _watch(service: Service, seconds: float) -> None:
    """Look for a newer checkpoint; it is loaded beside the requests."""
    while True:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(service.reload_if_changed)
