"""Events of a job become visible in the order of their ids, whoever writes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy.exc
from sqlalchemy import Engine, select, text, update
from sqlalchemy.orm import Session

from service import checkpoints, events, jobs, runs
from service.database import transaction
from service.models import Job
from tests.integration.seed import claim

Writer = Callable[[Session, str], object]

RUNNING: dict[str, Writer] = {
    "record": lambda session, job_id: events.record(session, job_id, 1, "anything"),
    "add_event": lambda session, job_id: runs.add_event(session, job_id, 1, "training"),
    "evaluation": lambda session, job_id: runs.record_evaluation(session, job_id, 1, 1, 1.0),
    "probe": lambda session, job_id: runs.record_probe(session, job_id, 1, 1),
    "checkpoint": lambda session, job_id: checkpoints.register(session, job_id, 1, 1, files=[], path="p"),
    "finish": lambda session, job_id: runs.finish(session, job_id, 1, "failed", error={"code": "x"}),
    "release": lambda session, job_id: runs.release(session, job_id, 1, "crash", progressed=True),
    "replan": lambda session, job_id: runs.release(
        session, job_id, 1, "memory", progressed=True, plan={"predicted_peak_bytes": 1}
    ),
    "cancel": lambda session, job_id: jobs.request(session, job_id, "cancel"),
    "pause": lambda session, job_id: jobs.request(session, job_id, "pause"),
}
QUEUED: dict[str, Writer] = {
    "cancel": lambda session, job_id: jobs.request(session, job_id, "cancel"),
    "pause": lambda session, job_id: jobs.request(session, job_id, "pause"),
}


def newest(bind: Engine, job_id: str) -> int:
    with transaction(bind) as session:
        return events.stand(session, job_id)[1]


def is_kept_waiting(bind: Engine, job_id: str, write: Writer) -> None:
    """While another transaction holds the job's row, as each that has written an event does until its end."""
    before = newest(bind, job_id)
    with transaction(bind) as other:
        other.execute(select(Job.id).where(Job.id == job_id).with_for_update(key_share=True))
        with pytest.raises(sqlalchemy.exc.OperationalError, match="lock timeout"), transaction(bind) as session:
            session.execute(text("SET LOCAL lock_timeout = '30ms'"))
            write(session, job_id)
    assert newest(bind, job_id) == before
    with transaction(bind) as session:
        write(session, job_id)
    assert newest(bind, job_id) > before


@pytest.mark.parametrize("name", RUNNING)
def test_who_writes_about_a_run_waits_for_who_wrote_before(bind: Engine, job: Job, name: str) -> None:
    claim(bind, job.id)
    is_kept_waiting(bind, job.id, RUNNING[name])


@pytest.mark.parametrize("name", QUEUED)
def test_who_writes_about_a_waiting_job_waits_for_who_wrote_before(bind: Engine, job: Job, name: str) -> None:
    is_kept_waiting(bind, job.id, QUEUED[name])


def test_claims_and_expired_leases_pass_a_job_whose_row_is_held(bind: Engine, job: Job) -> None:
    with transaction(bind) as other:
        other.execute(select(Job.id).where(Job.id == job.id).with_for_update(key_share=True))
        with transaction(bind) as session:
            assert runs.claim(session, job.id, "w", 60) is None
    claim(bind, job.id)
    before = newest(bind, job.id)
    with transaction(bind) as session:
        session.execute(update(Job).values(lease_until=text("now() - interval '1 second'")))
    with transaction(bind) as other:
        other.execute(select(Job.id).where(Job.id == job.id).with_for_update(key_share=True))
        with transaction(bind) as session:
            assert runs.requeue_expired(session) == []
    assert newest(bind, job.id) == before


def test_news_is_what_came_after_and_whether_more_can(bind: Engine, job: Job) -> None:
    claim(bind, job.id)
    with transaction(bind) as session:
        first, second, third = (event.id for event in events.page(session, job.id)[0])
        assert events.news(session, {job.id: third, "job_none": 0}, 10) == {}
        found = events.news(session, {job.id: first}, 10)[job.id]
        assert ([event.id for event in found.events], found.over) == ([second, third], None)
        runs.finish(session, job.id, 1, "cancelled")
    with transaction(bind) as session:
        assert events.news(session, {job.id: first}, 3)[job.id].over is None  # there may be a fourth
        assert events.news(session, {job.id: first}, 4)[job.id].over == "cancelled"
        assert events.news(session, {job.id: 2**62}, 4)[job.id].events == []


def test_an_event_of_no_job_is_refused(bind: Engine) -> None:
    with pytest.raises(sqlalchemy.exc.NoResultFound), transaction(bind) as session:
        events.record(session, "job_none", 1, "anything")
