"""The entry to running a job: take the device, claim the job, run one attempt, give the device back."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Sequence

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import database, queue, runs
from service.settings import Settings
from worker.attempt import Attempt
from worker.ledger import is_outage
from worker.slot import WAIT_SECONDS, device_slot
from worker.stop import StopRequest

TRAINER_COMMAND = (sys.executable, "-m", "worker.trainer")

logger = logging.getLogger(__name__)


def worker_name() -> str:
    """This process, for people who look at a job."""
    return f"{platform.node()}:{os.getpid()}"


def supervise(
    job_id: str,
    settings: Settings,
    command: Sequence[str] = TRAINER_COMMAND,
    device_wait_seconds: float = WAIT_SECONDS,
) -> None:
    """Run one attempt at a job, if it waits for one and this machine's device is free; else return at once.

    A message may come late, twice or for a job that is long gone: what counts is the row. A job that is queued again
    when the attempt ends is announced once the device is free.
    """
    bind = database.engine(settings)
    try:
        with StopRequest() as stop, device_slot(settings.data_dir, wait_seconds=device_wait_seconds) as slot:
            if slot is None:
                logger.info("%s: the device is in use", job_id)
                return
            queued_again = _run(job_id, bind, settings, command=command, slot=slot, stop=stop)
        if queued_again:
            queue.wake(job_id, queue.producer(settings.redis_url))
    finally:
        bind.dispose()


def _run(
    job_id: str, bind: Engine, settings: Settings, *, command: Sequence[str], slot: int, stop: StopRequest
) -> bool:
    if stop.requested:
        return False
    try:
        with database.transaction(bind) as session:
            job = runs.claim(session, job_id, worker_name(), settings.lease_seconds)
    except SQLAlchemyError as error:
        if not is_outage(error):
            raise
        logger.warning("%s: not claimed, the database does not answer: %s", job_id, str(error).splitlines()[0])
        return False
    if job is None:
        logger.info("%s: not queued", job_id)
        return False
    logger.info("%s: attempt %d", job.id, job.attempt)
    return Attempt(job, bind, settings, command=command, slot=slot, stop=stop).run()
