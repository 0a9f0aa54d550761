"""A job's events as they happen: replayed from the database, then from the hub."""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api import sse
from api.event_hub import EventHub, Watch
from service.status import JobStatus

logger = logging.getLogger(__name__)

RETRY_MILLISECONDS = 2_000
"""After which an EventSource comes back."""
LONGEST_SECONDS = 3_600.0
"""After which a stream ends in the middle: its client comes back, and shows anew that it may."""
SEND_SECONDS = 60.0
"""For which a client may read nothing."""
END = ".end"
"""Behind the last id of a job that is over. Who comes back with it is answered 204, upon which an EventSource stops."""


class EventStream(Response):
    """The answer. Its place is taken when it is sent, and given back when the client goes away."""

    def __init__(
        self, hub: EventHub, tenant: str, job_id: str, after: int, newest: int, heartbeat_seconds: float
    ) -> None:
        """`after` is the last event that the client has, `newest` the last one that there was."""
        super().__init__()
        self._hub = hub
        self._tenant = tenant
        self._job_id = job_id
        self._last = min(after, newest)
        self._newest = newest
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's
        """Raises TooManyStreamsError before anything is sent, ClientDisconnect when the client went away."""
        with self._hub.place(self._tenant):
            work = asyncio.create_task(self._send(send))
            gone = asyncio.create_task(sse.disconnected(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                await work
            finally:
                work.cancel()
                gone.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        await _write(send, f"retry: {RETRY_MILLISECONDS}\n\n".encode())
        try:
            async with asyncio.timeout(LONGEST_SECONDS) as limit:
                await self._events(send)
        except TimeoutError:
            if not limit.expired():
                raise
        except SQLAlchemyError as error:
            logger.warning("a stream ends without the database: %s", str(error).splitlines()[0])
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, send: Send) -> None:
        """Until the job is over or the process ends. Raises SQLAlchemyError."""
        with self._hub.watching(self._job_id, self._newest) as watch:
            while not self._hub.closed:
                changed = watch.changed
                entries, over = await self._next(watch)
                if entries:
                    self._last = entries[-1][0]
                    await _write(send, b"".join(encoded for _, encoded in entries))
                if over is not None:
                    await _write(send, sse.event("end", {"status": over.value}, f"{self._last}{END}"))
                    return
                if not entries and not await _within(changed, self._heartbeat_seconds):
                    await _write(send, sse.HEARTBEAT)

    async def _next(self, watch: Watch) -> tuple[list[tuple[int, bytes]], JobStatus | None]:
        if self._last >= watch.since:
            return watch.after(self._last)
        return await self._hub.read(self._job_id, self._last)


async def _within(changed: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await changed.wait()
    except TimeoutError:
        return False
    return True


async def _write(send: Send, body: bytes) -> None:
    """Raises ClientDisconnect if the client does not read what there was before."""
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    except TimeoutError:
        raise ClientDisconnect from None
