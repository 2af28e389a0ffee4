"""What stands before the answers of a server: token, limits, numbers."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from recbole_simdiff.serving.service import Limits, Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = "/health"  # needs no token

PATHS = ("/recommend", "/items", "/metrics", OPEN)

# A body that is too large is read to this many times the limit, so that the client sees the answer.
DRAINED = 8


class _Refused(Exception):
    """The request gets this status and text in place of an answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """Middleware that lets through what has the token and is within the limits.

    Args:
        app (Callable): the ASGI application behind it.
        limits (Limits): of size and time of a body.
        metrics (Metrics): are told of every request.
        token (str | None): the bearer token that every path but ``/health`` needs; None for none.
    """

    def __init__(self, app: App, limits: Limits, metrics: Metrics, token: str | None) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, begin, status = scope["path"], time.perf_counter(), 499  # the client has gone

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self.metrics.in_progress.track_inprogress():
            try:
                self._check_token(scope)
                body = await self._body(scope, receive)
                await self.app(scope, _replayed(body, receive), counting)
            except _Refused as refusal:
                await _refuse(refusal, counting)
            finally:
                label = path if path in PATHS else "other"
                self.metrics.requests.labels(label, str(status)).inc()
                self.metrics.seconds.labels(label).observe(time.perf_counter() - begin)

    def _check_token(self, scope: MutableMapping[str, Any]) -> None:
        if self._token is None or scope["path"] == OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._token):
            raise _Refused(401, "this server needs the header Authorization: Bearer TOKEN")

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        limit = self.limits.body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = _Refused(413, f"the body has more than {limit} bytes")
        if not length.isdigit() or int(length) > DRAINED * limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.seconds):
                parts, size = [], 0
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(499, "the client has gone")
                    size += len(message.get("body", b""))
                    if size > DRAINED * limit:
                        raise too_large
                    if size <= limit:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            text = f"the body did not arrive within {self.limits.seconds:g} seconds"
            raise _Refused(408, text) from None
        if size > limit:
            raise too_large
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, as the application receives it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(refusal: _Refused, send: Send) -> None:
    """Answer with the refusal's status, and close the connection."""
    body = f'{{"detail":"{refusal}"}}'.encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
