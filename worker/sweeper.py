"""The sweeper: `python -m worker.sweeper`. Puts right, every few seconds, what crashes and lost messages left."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import NoReturn

from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import database, jobs, queue, runs
from service.settings import Settings, load_settings
from service.storage import Storage

LOCK_KEY = 0x511_57EE7
"""Of the advisory lock under which one sweeper at a time works."""

logger = logging.getLogger(__name__)


def sweep(bind: Engine, app: Celery) -> list[str]:
    """Requeue the jobs whose lease ran out, and wake workers for the jobs that wait; returns the requeued ones.

    Does nothing while another sweeper is at it.
    """
    with database.transaction(bind) as session:
        if not database.try_lock(session, LOCK_KEY):
            return []
        requeued = runs.requeue_expired(session)
        waiting = jobs.queued_ids(session)
    for job_id in requeued:
        logger.warning("%s: its lease ran out, queued again", job_id)
    _wake(app, waiting)
    return requeued


def _wake(app: Celery, waiting: list[str]) -> None:
    # Where as many messages wait as jobs, each of these will find a worker. Without this a queue behind a job of a
    # week would grow by 60,000 messages for every job in it.
    messages = queued_messages(app) if waiting else 0
    if messages is None or messages >= len(waiting):
        return
    for job_id in waiting:
        if not queue.wake(job_id, app):
            return  # the broker is away; the next sweep tries again


def queued_messages(app: Celery) -> int | None:
    """How many messages wait in the broker; None if it does not answer."""
    try:
        with app.connection_for_write() as connection:
            return int(connection.default_channel.client.llen(queue.QUEUE))
    except Exception as error:  # noqa: BLE001  # kombu and redis raise what they like; no broker is no error here
        logger.warning("the broker does not answer: %s", error)
        return None


def run(settings: Settings) -> NoReturn:
    """Sweep until the process is told to end. Outlives restarts of the database and the broker."""
    bind = database.engine(settings)
    app = queue.producer(settings.redis_url)
    storage = Storage(settings.data_dir)
    while True:
        try:
            sweep(bind, app)
            storage.clean_temporary()
        except SQLAlchemyError as error:
            logger.warning("not swept: %s", str(error).splitlines()[0])
        except OSError as error:
            logger.warning("temporary files not cleaned: %s", error)
        time.sleep(settings.sweep_seconds)


def _exit(_number: int, _frame: FrameType | None) -> None:
    # At once, without unwinding: that would roll back first, and wait for a database that may not answer. The server
    # rolls back by itself, and the next sweep does again what this one had begun.
    os._exit(0)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    run(load_settings())


if __name__ == "__main__":
    main()
