"""The entry to running a job: take a slot of the device, claim what is next, run one attempt, give the slot back."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Sequence

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import claims, database, jobs, logs, queue, tracing
from service.runs import ClaimedJob
from service.settings import Settings
from service.storage import open_storage
from worker import spans
from worker.attempt import Attempt
from worker.ledger import is_outage
from worker.slot import WAIT_SECONDS, Slot, device_id, device_slot
from worker.stop import StopRequest

TRAINER_COMMAND = (sys.executable, "-m", "worker.start")

FLUSH_SECONDS = 1.0
"""For the spans of an attempt: an idle pool process may be ended at any time, and takes with it what is not sent."""

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
    """Run one attempt at the job that is next on this machine's device, if it fits and a slot is free.

    A message means "look for work": it may come late, twice, or for a job (`job_id`) that is long gone, and what counts
    are the rows. When a job was taken, or has ended, others may look: another slot may have room for what is next.
    """
    bind = database.engine(settings)
    device = device_id(settings.device_kind)
    tracing.start(settings, "slimtune-worker")
    logger.info("woken for %s", job_id)
    try:
        # Before a job is taken, which in a folder that is refused would end by its lease, time and again.
        storage = open_storage(settings)
        with (
            StopRequest() as stop,
            device_slot(
                settings.data_dir, device, slots=settings.worker_slots, wait_seconds=device_wait_seconds
            ) as slot,
        ):
            if slot is None:
                logger.info("all slots are in use")
                return
            if not storage.is_reachable():
                # Jobs that wait have nothing to lose. One that was taken would be paused after its patience, for
                # somebody to resume; so would all that wait, one after the other, by one host that cannot reach it.
                logger.warning("nothing claimed: the files cannot be reached")
                return
            job = None if stop.requested else _claim(bind, settings, device, slot)
            if job is None:
                return
            with (
                logs.bound(job_id=job.id, attempt=job.attempt),
                tracing.span("attempt", kind="consumer", parent=job.trace, attributes=spans.of_job(job)) as span,
            ):
                logger.info("the attempt begins")
                attempt = Attempt(
                    job, bind, settings, command=command, slot=slot.descriptor, stop=stop, span=span, storage=storage
                )
                _let_others_look(bind, settings)  # after that: the attempt counts its lease from the line above
                attempt.run()
        _let_others_look(bind, settings)
        tracing.flush(FLUSH_SECONDS)
    except OSError as error:
        # No slot can be taken, or what would run in it cannot be noted: the job waits for a later message or sweep.
        logger.warning("nothing started, the locks in the data directory cannot be written: %s", error)
    finally:
        bind.dispose()


def _claim(bind: Engine, settings: Settings, device: str, slot: Slot) -> ClaimedJob | None:
    try:
        with database.transaction(bind) as session:
            job = claims.next_job(
                session,
                device,
                worker_name(),
                lease_seconds=settings.lease_seconds,
                patience_seconds=settings.patience_seconds,
                held_here=slot.others,
            )
            if job is not None:
                slot.note(job.id, job.attempt, job.memory_cap_bytes)
    except SQLAlchemyError as error:
        if not is_outage(error):
            raise
        logger.warning("nothing claimed, the database does not answer: %s", str(error).splitlines()[0])
        return None
    if job is None:
        logger.info("%s: nothing to start", device)
    return job


def _let_others_look(bind: Engine, settings: Settings) -> None:
    """One more message where jobs wait and none is under way; best effort, the sweeper does the same."""
    try:
        with database.transaction(bind) as session:
            waiting = jobs.queued_ids(session, limit=1)
    except SQLAlchemyError as error:
        logger.warning("nobody is woken, the database does not answer: %s", str(error).splitlines()[0])
        return
    app = queue.producer(settings.redis_url)
    if waiting and queue.waiting_messages(app) == 0:
        queue.wake(waiting[0], app)
