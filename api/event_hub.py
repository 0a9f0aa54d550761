"""Who watches which job, and one query a second for all of them.

Everything but the queries runs on the event loop, so nothing here is locked.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from api import sse
from api.responses import EventResponse
from service import database, events
from service.errors import TooManyStreamsError
from service.status import JobStatus

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
PAGE = 64
"""Events of a job in one answer of the database."""
TAIL = 64
"""The newest events of a watched job that are kept for its streams. Who is further behind reads the database."""
READERS = 4
"""Streams that read the database at once, so that a thousand that come back after a restart leave it to others too."""

Encoded = tuple[int, bytes]
"""An event's id, and the event as it is sent."""


class Watch:
    """One job with streams on it. `position` is the newest event that the hub has seen."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.since = position
        """`tail` has all events after this one."""
        self.tail: deque[Encoded] = deque()
        self.over: JobStatus | None = None
        """How the job ended, once all its events have been seen."""
        self.changed = asyncio.Event()
        """Set at the next change, when another takes its place."""
        self.streams = 0

    def after(self, last: int) -> tuple[list[Encoded], JobStatus | None]:
        """The events after `last`, which must not lie before `since`."""
        return [entry for entry in self.tail if entry[0] > last], self.over

    def add(self, entries: list[Encoded], over: JobStatus | None) -> None:
        self.tail.extend(entries)
        while len(self.tail) > TAIL:
            self.since = self.tail.popleft()[0]
        if entries:
            self.position = entries[-1][0]
        self.over = over
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class EventHub:
    """The streams of one process. Its own thread and connection are in use only while it asks."""

    def __init__(self, bind: Engine, limit: int) -> None:
        self._bind = bind
        self._limit = limit
        self._taken: Counter[str] = Counter()
        self._watches: dict[str, Watch] = {}
        self._poller: asyncio.Task[None] | None = None
        self._asking = CapacityLimiter(1)
        self._reading = CapacityLimiter(READERS)
        self.closed = False
        """Whether the process is about to end: streams end too, and their clients go on elsewhere."""

    @property
    def streams(self) -> int:
        return self._taken.total()

    @contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """Of one stream. A tenant has half of the places at most. Raises TooManyStreamsError."""
        if self.streams >= self._limit:
            raise TooManyStreamsError(self._limit)
        if self._taken[tenant] >= (share := (self._limit + 1) // 2):
            raise TooManyStreamsError(share)
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            self._taken += Counter()  # who has none left is forgotten

    @contextmanager
    def watching(self, job_id: str, newest: int) -> Iterator[Watch]:
        """The job's watch. `newest` is the id of an event of this job that a committed transaction has seen, or 0 if
        it saw none."""
        watch = self._watches.setdefault(job_id, Watch(newest))
        watch.streams += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())
        try:
            yield watch
        finally:
            watch.streams -= 1
            if not watch.streams:
                del self._watches[job_id]

    async def read(self, job_id: str, last: int) -> tuple[list[Encoded], JobStatus | None]:
        """As `Watch.after`, from the database: the next page. Raises SQLAlchemyError."""
        found = await to_thread.run_sync(self._ask, {job_id: last}, limiter=self._reading)
        return found.get(job_id, ([], None))

    def close(self) -> None:
        """End all streams."""
        self.closed = True
        if self._poller is not None:
            self._poller.cancel()
        for watch in self._watches.values():
            watch.wake()

    async def _poll(self) -> None:
        while self._watches:
            await asyncio.sleep(POLL_SECONDS)
            positions = {job_id: watch.position for job_id, watch in self._watches.items() if watch.over is None}
            if not positions:
                continue
            try:
                found = await to_thread.run_sync(self._ask, positions, limiter=self._asking)
            except SQLAlchemyError as error:
                logger.warning("streams wait for the database: %s", str(error).splitlines()[0])
                continue
            for job_id, (entries, over) in found.items():
                watch = self._watches.get(job_id)
                # Another than the one that was asked for, if its streams went and new ones came meanwhile.
                if watch is not None and watch.position == positions[job_id]:
                    watch.add(entries, over)

    def _ask(self, positions: dict[str, int]) -> dict[str, tuple[list[Encoded], JobStatus | None]]:
        with database.transaction(self._bind) as session:
            found = events.news(session, positions, PAGE)
        return {job_id: ([_encoded(row) for row in news.events], news.over) for job_id, news in found.items()}


def _encoded(row: events.StoredEvent) -> Encoded:
    data = EventResponse.model_validate(row).model_dump_json()
    return row.id, sse.event(row.type, data, str(row.id))
