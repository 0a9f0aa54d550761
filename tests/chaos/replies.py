"""Faults between a client and the API: answers that are lost, and requests that are repeated with their keys."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import select

from cli.client import Client, ServiceError
from service import database
from service.models import Dataset, Job
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.proxy import HttpProxy, Loss
from tests.chaos.servers import job_body
from tests.integration.stage import Stage, wait_for

TIMEOUT_SECONDS = 0.8
"""Of the client, times the arena's slack."""
SIDE_BY_SIDE = 12
BUSY_SECONDS, FREE_SECONDS = 0.5, 0.1
"""How long submissions wait in the server, again and again: a request is repeated while it is being worked on."""
LOSSES: tuple[Loss, ...] = get_args(Loss)
QUICK: tuple[Loss, ...] = ("unsent", "unheard", "unanswered", "cut")
"""Seen by the client before its time is out."""


@dataclass(frozen=True, slots=True)
class _Submission:
    """A job that is asked for once, and what is done to the requests."""

    name: str
    losses: tuple[Loss, ...]
    """Fewer than the client's tries by two: a repeated request can also come while the first is being worked on."""
    late_seconds: float


@dataclass(frozen=True, slots=True)
class _Outcome:
    name: str
    job_id: str | None
    error: str | None
    lost: int
    """Answers of 202 that were the first to tell of a job, and reached nobody."""
    seconds: float


def lost_replies(arena: Arena, cycles: int) -> Iterator[str]:
    """The client repeats what was not answered, until so many first answers were lost."""
    with arena.stage() as stage, _busy(stage), ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        body = job_body(stage)
        server = _server(arena, stage)
        outcomes: list[_Outcome] = []
        while (missing := cycles - sum(outcome.lost for outcome in outcomes)) > 0:
            count = max(missing, SIDE_BY_SIDE)
            submissions = [_submission(arena, len(outcomes) + number) for number in range(count)]
            found = list(pool.map(lambda submission: _submit(arena, server, body, submission), submissions))
            outcomes += found
            if not any(outcome.lost for outcome in found):
                yield f"{count} submissions, and no answer of them was lost after its commit"
                break
        arena.recoveries += [outcome.seconds for outcome in outcomes]
        yield from _wrong(stage, outcomes)


@contextmanager
def _busy(stage: Stage) -> Iterator[None]:
    """Locks the datasets' rows, which every submission asks for."""
    ended = threading.Event()

    def lock() -> None:
        while not ended.wait(FREE_SECONDS):
            with database.transaction(stage.bind) as session:
                session.execute(select(Dataset.id).with_for_update())
                time.sleep(BUSY_SECONDS)

    thread = threading.Thread(target=lock, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _server(arena: Arena, stage: Stage) -> Path:
    """The socket of an API that answers."""
    path = stage.settings.data_dir / "api.sock"
    stage.start("api", [sys.executable, "-m", "tests.chaos.server", str(path)])
    wait_for("the API", lambda: _listens(path), arena.patience_seconds)
    return path


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _submission(arena: Arena, number: int) -> _Submission:
    random = arena.random
    losses = (random.choice(LOSSES), *random.choices(QUICK, k=random.randint(0, 1)))
    return _Submission(f"submission {number}", losses, 0.3 * random.random())


def _submit(arena: Arena, server: Path, body: dict[str, Any], submission: _Submission) -> _Outcome:
    job_id, error = None, None
    began = time.monotonic()
    with HttpProxy(server, submission.losses, submission.late_seconds) as proxy:
        with Client(proxy.url, timeout_seconds=TIMEOUT_SECONDS * arena.slack) as client:
            try:
                job_id = client.jobs.create(**{**body, "name": submission.name}).id
            except ServiceError as refusal:
                error = str(refusal)
        seconds = time.monotonic() - began
    return _Outcome(submission.name, job_id, error, sum(map(_tells_of_a_job, proxy.lost_answers)), seconds)


def _tells_of_a_job(answer: bytes) -> bool:
    head = answer.partition(b"\r\n\r\n")[0].lower()
    return head.startswith(b"http/1.1 202") and b"idempotency-replayed" not in head


def _wrong(stage: Stage, outcomes: list[_Outcome]) -> Iterator[str]:
    """Each submission has one job, which is the one that it was told of, and there are no others."""
    jobs: dict[str | None, list[str]] = defaultdict(list)
    with database.transaction(stage.bind) as session:
        for name, job_id in session.execute(select(Job.name, Job.id)):
            jobs[name].append(job_id)
    for outcome in outcomes:
        if (made := jobs.pop(outcome.name, [])) != [outcome.job_id]:
            yield f"{outcome.name} was told of {outcome.job_id or outcome.error}, and has the jobs {made}"
    if jobs:
        yield f"nobody has asked for {dict(jobs)}"


REPLIES = (
    Fault(
        "reply",
        "the answer to POST /jobs is lost after the commit, the request is repeated with its key: the same job",
        "lost replies",
        full=200,
        short=10,
        inflict=lost_replies,
        guards=("idempotency",),
    ),
)
