"""Faults of the processes that run a job: trainer, supervisor, worker, and the messages that wake them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from service import queue
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.integration.stage import Stage, wait_for

LONG = 100_000
"""Steps of a job that does not end by itself."""


@contextlib.contextmanager
def worker(stage: Stage, application: str = "tests.integration.fake_worker", **options: object) -> Iterator[None]:
    """A Celery worker, by default with fake trainers of these options."""
    process = start_worker(stage, application, **options)
    yield
    process.terminate()
    process.wait(60)


def start_worker(
    stage: Stage, application: str = "tests.integration.fake_worker", **options: object
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celery", "-A", application, "worker", "--loglevel=INFO"]
    command += ["--without-mingle", "--without-gossip"]  # a second of looking for other workers
    return stage.start("worker", command, FAKE_TRAINER_OPTIONS=json.dumps(options))


def repeated_messages(arena: Arena, cycles: int) -> Iterator[str]:
    """Each job is announced five times, all of them mixed."""
    with arena.stage() as stage:
        ids = [stage.create_job(steps=2) for _ in range(cycles // 5)]
        messages = 5 * ids
        arena.random.shuffle(messages)
        app = queue.producer(stage.settings.redis_url)
        for job_id in messages:
            if not queue.wake(job_id, app):
                yield f"{job_id}: the broker did not take its message"
        with worker(stage, step_seconds=0.0):
            wait_for("the end of all messages", lambda: stage.waiting_messages() == 0, 60 + cycles)
            for job_id in ids:
                stage.end(job_id, "succeeded", seconds=60)
        for job_id in ids:
            attempts, starts = stage.job(job_id).attempt, len(stage.trace(job_id))
            if (attempts, starts) != (1, 1):
                yield f"{job_id}: {attempts} attempts, {starts} trainers"


PROCESSES = (
    Fault(
        "message",
        "the same message five times; one attempt",
        "messages",
        full=1_000,
        short=60,
        inflict=repeated_messages,
        guards=(),
    ),
)
