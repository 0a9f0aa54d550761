"""What surrounds every request: its id, the last resort for exceptions, the limit on bodies. Plain ASGI."""

from __future__ import annotations

import logging
import re
import time

from anyio import fail_after
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import sse
from api.errors import BodyEncodingError, BodyStalledError, BodyTooLargeError, HeadTooLargeError, service_problem
from api.problems import problem_response, shown
from api.prometheus import RequestNumbers
from service import logs
from service.errors import ServiceError
from service.ids import new_id

logger = logging.getLogger(__name__)
access = logging.getLogger("api.access")

MAX_JSON_BYTES = 1_000_000
MAX_HEAD_BYTES = 65_536
"""Of path, query and headers together."""
BODY_SECONDS = 60.0
"""A body that is to be read whole must be there by then, however steadily it drips."""


class RequestContext:
    """Gives each request an id of our own making, a line in the log and a place in the counts, and turns what nobody
    handled into a 500 without internals.
    """

    def __init__(self, app: ASGIApp, numbers: RequestNumbers) -> None:
        self._app = app
        self._numbers = numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        with logs.bound(request_id=request_id):
            await self._answer(scope, receive, send, request_id)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEAD_BYTES:
            raise HeadTooLargeError(MAX_HEAD_BYTES)
        await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        status: int | None = None
        answered: float | None = None
        streamed = False

        async def send_marked(message: Message) -> None:
            nonlocal status, answered, streamed
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                streamed = headers.get("content-type", "").startswith(sse.MEDIA_TYPE)
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                answered = time.monotonic()  # background tasks come after it

        began = time.monotonic()
        try:
            await self._call(scope, receive, send_marked)
        except ClientDisconnect:
            logger.info("the client went away")
        except HeadTooLargeError as error:
            await service_problem(scope, error)(scope, receive, send_marked)
        except Exception:
            logger.exception("nobody handled this")
            if status is not None:
                raise
            response = problem_response(scope, 500, "internal_error", "Something went wrong on the server's side.")
            await response(scope, receive, send_marked)
        finally:
            seconds = (answered or time.monotonic()) - began
            self._numbers.count(scope, status, None if streamed else seconds)
            # The path without its query, which may hold what is not for a log.
            fields = {
                "method": scope["method"],
                "path": shown(scope["path"]),
                "status": status,
                "milliseconds": round(1_000 * seconds, 1),
            }
            access.info("%(method)s %(path)s %(status)s %(milliseconds)s ms", fields, extra={"fields": fields})


class BodyLimit:
    """Reads a body whole before the route sees it, and refuses one over the limit, or that takes too long, without
    reading on.

    FastAPI's own limit answers some of these cases in plain text; this is the one for problem details. Paths that
    take uploads are left out: they limit while they stream.
    """

    def __init__(self, app: ASGIApp, streaming: re.Pattern[str], max_bytes: int = MAX_JSON_BYTES) -> None:
        """`streaming` matches a path that takes uploads, whole."""
        self._app = app
        self._streaming = streaming
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD"} or self._streaming.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ServiceError as error:
            await service_problem(scope, error)(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()  # waits for the disconnect
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Raises BodyTooLargeError, BodyStalledError, BodyEncodingError, ClientDisconnect."""
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isascii() and announced.isdigit() and int(announced[:19]) > self._max_bytes:
            raise BodyTooLargeError(self._max_bytes)
        body = bytearray()
        try:
            with fail_after(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise BodyTooLargeError(self._max_bytes)
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise BodyStalledError(BODY_SECONDS) from error
        if b"\0" in body[:4]:  # as the first letters of JSON in UTF-16 and UTF-32 have, and no JSON in UTF-8
            raise BodyEncodingError
        return bytes(body)
