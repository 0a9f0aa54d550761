"""The sender of webhooks: `python -m worker.webhooks`. Several may run."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Self

import httpx2
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import database, logs, outbox, signatures, webhook_urls
from service.outbox import Claimed, Outcome
from service.settings import load_settings
from service.webhook_urls import Allowed, UrlError

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 10.0
"""For an attempt, the wait for a name's address included. Well below outbox.LEASE."""
AT_ONCE = 32
"""Attempts, one for each webhook. More than a tenant has webhooks: one whose receivers all hang leaves room."""
POLL_SECONDS = 1.0
FORGET_SECONDS = 600.0
"""Between two looks at what is old enough to be deleted."""
USER_AGENT = "slimtune-webhooks/1"

logger = logging.getLogger(__name__)


class Sender:
    """Sends what is due. An asynchronous context manager."""

    def __init__(self, bind: Engine, allowed: Allowed) -> None:
        self._bind = bind
        self._allowed = allowed
        self._running: set[asyncio.Task[None]] = set()
        self._forgot = 0.0
        # One connection for each attempt: no answer is read further than its headers. No proxy, password file or
        # certificate of the environment's is used for what a tenant has asked for, but for the system's authorities.
        self._http = httpx2.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(TOTAL_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_keepalive_connections=0),
            headers={"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity"},
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.finish()
        await self._http.aclose()

    async def start_due(self) -> int:
        """Begin the attempts that are due, as many as there is room for; returns how many. Raises SQLAlchemyError."""
        room = AT_ONCE - len(self._running)
        claimed = await asyncio.to_thread(self._claim, room) if room else []
        for attempt in claimed:
            task = asyncio.create_task(self._deliver(attempt))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return len(claimed)

    async def finish(self) -> None:
        """Wait for the attempts that have begun."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def run(self, stop: asyncio.Event) -> None:
        """Send until told to stop. Outlives restarts of the database."""
        while not stop.is_set():
            try:
                started = await self.start_due()
                if time.monotonic() > self._forgot + FORGET_SECONDS:
                    await asyncio.to_thread(self._forget)
                    self._forgot = time.monotonic()
            except SQLAlchemyError as error:
                logger.warning("nothing sent: %s", str(error).splitlines()[0])
                started = 0
            if not started or len(self._running) == AT_ONCE:
                waiting = [*self._running, asyncio.create_task(stop.wait())]
                await asyncio.wait(waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                waiting[-1].cancel()

    def _claim(self, room: int) -> list[Claimed]:
        with database.transaction(self._bind) as session:
            return outbox.claim(session, room)

    def _forget(self) -> None:
        with database.transaction(self._bind) as session:
            outbox.forget_done(session)

    def _record(self, attempt: Claimed, outcome: Outcome) -> None:
        with database.transaction(self._bind) as session:
            outbox.record(session, attempt, outcome)

    async def _deliver(self, attempt: Claimed) -> None:
        try:
            outcome = await self._send(attempt)
        except Exception:  # without an outcome it would be sent again each minute, for ever
            logger.exception("%s to %s, attempt %d", attempt.event_id, attempt.webhook_id, attempt.attempt)
            outcome = Outcome(error="unreachable")
        said = outcome.error or "delivered"
        status = "" if outcome.response_status is None else f" ({outcome.response_status})"
        logger.info("%s to %s, attempt %d: %s%s", attempt.event_id, attempt.webhook_id, attempt.attempt, said, status)
        try:
            await asyncio.to_thread(self._record, attempt, outcome)
        except SQLAlchemyError as error:
            logger.warning("%s will be sent again: %s", attempt.event_id, str(error).splitlines()[0])

    async def _send(self, attempt: Claimed) -> Outcome:
        try:
            target = webhook_urls.parse(attempt.url)
        except UrlError:
            return Outcome(error="not_allowed")
        if not self._allowed.covers(target):  # any more
            return Outcome(error="not_allowed")
        headers = signatures.headers(attempt.event_id, int(time.time()), attempt.body, attempt.keys)
        headers["Content-Type"] = "application/json"
        try:
            async with (
                asyncio.timeout(TOTAL_SECONDS),
                self._http.stream("POST", target.url, content=attempt.body, headers=headers) as response,
            ):
                return _outcome(response)
        except (TimeoutError, httpx2.TimeoutException):
            return Outcome(error="timeout")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            logger.debug("%s: %s", attempt.webhook_id, type(error).__name__)
            return Outcome(error="unreachable")


def _outcome(response: httpx2.Response) -> Outcome:
    status = response.status_code
    if 200 <= status < 300:
        return Outcome(status)
    error = "redirected" if 300 <= status < 400 else "refused"
    return Outcome(status, error, _seconds(response.headers.get("retry-after", "")))


def _seconds(retry_after: str) -> float | None:
    """Of a `Retry-After` (RFC 9110, 10.2.3): seconds, or a date."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        date = parsedate_to_datetime(retry_after).astimezone(UTC)
    except (ValueError, OverflowError):  # no date, or one beyond all calendars
        return None
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)


async def _main(bind: Engine, allowed: Allowed) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    logger.info("webhooks may go to %s", ", ".join(prefix.host for prefix in allowed.prefixes) or "nowhere")
    async with Sender(bind, allowed) as sender:
        await sender.run(stop)


def main() -> None:
    settings = load_settings()
    logs.configure(settings.log_format)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # its lines have URLs, in which there may be keys
    bind = database.engine(settings)
    asyncio.run(_main(bind, Allowed.parse(settings.webhook_allowed)))
    bind.dispose()


if __name__ == "__main__":
    main()
