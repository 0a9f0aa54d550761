"""The sweeper: `python -m worker.sweeper`. Puts right, every few seconds, what crashes and lost messages left."""

from __future__ import annotations

import functools
import logging
import os
import signal
import time
from types import FrameType
from typing import NoReturn

from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import database, datasets, devices, idempotency, jobs, logs, part_uploads, queue, retention, runs, uploads
from service.errors import StorageUnavailableError
from service.settings import Settings, load_settings
from service.storage import Storage, open_storage, stderr_path
from worker.process import tail

LOCK_KEY = 0x511_57EE7
"""Of the advisory lock under which one sweeper at a time works."""
PRUNE_SECONDS = 60.0
"""Between looks for what has had its time, where the last one found nothing."""

logger = logging.getLogger(__name__)


def sweep(bind: Engine, app: Celery, storage: Storage) -> list[str]:
    """Requeue the jobs whose lease ran out, and wake workers for the jobs that wait; returns the requeued ones.

    Does nothing while another sweeper is at it.
    """
    with database.transaction(bind) as session:
        if not database.try_lock(session, LOCK_KEY):
            return []
        requeued = runs.requeue_expired(session, log_of=functools.partial(_log_of, storage))
        waiting = jobs.queued_ids(session)
        slots = devices.live_slots(session)
        idempotency.forget_expired(session)
    for job_id in requeued:
        with logs.bound(job_id=job_id):
            logger.warning("its lease ran out, queued again")
    _wake(app, waiting, slots)
    return requeued


def _log_of(storage: Storage, job_id: str, attempt: int) -> list[str]:
    try:
        return tail(storage.path(stderr_path(job_id, attempt)))
    except OSError as error:  # a log is nice to have; the job must not wait for it
        with logs.bound(job_id=job_id, attempt=attempt):
            logger.warning("the trainer's log cannot be read: %s", error)
        return []


def _wake(app: Celery, waiting: list[str], slots: int) -> None:
    # A message makes one slot look, so as many as there are slots are enough; more would pile up behind a job of a
    # week, 60,000 of them for every job in the queue.
    wanted = waiting[: max(slots, 1)]
    messages = queue.waiting_messages(app) if wanted else None
    if messages is None:
        return
    for job_id in wanted[messages:]:
        if not queue.wake(job_id, app):
            return  # the broker is away; the next sweep tries again


def run(settings: Settings) -> NoReturn:
    """Sweep until the process is told to end. Outlives restarts of the database and the broker."""
    bind = database.engine(settings)
    app = queue.producer(settings.redis_url)
    storage = open_storage(settings)
    prune_at = time.monotonic()
    while True:
        try:
            sweep(bind, app, storage)
            storage.clean_temporary()
            storage.tidy()
            uploads.settle(bind, storage)
            part_uploads.settle(bind, storage)
            datasets.remove_expired(bind, storage)
            if time.monotonic() >= prune_at and not retention.prune(bind, storage, settings).anything:
                prune_at = time.monotonic() + PRUNE_SECONDS
        except SQLAlchemyError as error:
            logger.warning("not swept: %s", str(error).splitlines()[0])
        except OSError as error:
            logger.warning("files not cleaned: %s", error)
        except StorageUnavailableError as error:
            logger.warning("files not cleaned: %s", error.detail)
        time.sleep(settings.sweep_seconds)


def _exit(_number: int, _frame: FrameType | None) -> None:
    # At once, without unwinding: that would roll back first, and wait for a database that may not answer. The server
    # rolls back by itself, and the next sweep does again what this one had begun.
    os._exit(0)


def main() -> None:
    settings = load_settings()
    logs.configure(settings.log_format)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    run(settings)


if __name__ == "__main__":
    main()
