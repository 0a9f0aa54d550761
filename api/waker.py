"""Messages to the workers, few for many jobs."""

from __future__ import annotations

import time

from anyio import sleep, to_thread
from celery import Celery

from service import queue

LEAST_SECONDS = 0.25
"""Between two messages of this process."""


class Waker:
    """Has a worker look for work after each `wake`, with one message for all that come within `LEAST_SECONDS`.

    One is enough: a worker that takes a job has the next one look for more (worker.supervisor). A message for each job
    of a long queue would cost the worker more than all else that a job's creation does. For one event loop.
    """

    def __init__(self, producer: Celery) -> None:
        self._producer = producer
        self._sent = 0.0
        self._due = False

    async def wake(self, job_id: str) -> None:
        """Returns when the message is sent, or another call is about to send one."""
        if self._due:
            return
        wait = self._sent + LEAST_SECONDS - time.monotonic()
        if wait > 0:
            self._due = True
            try:
                await sleep(wait)
            finally:
                self._due = False
        self._sent = time.monotonic()
        await to_thread.run_sync(queue.wake, job_id, self._producer)
