"""The log of a job: what happened to it, in the transaction in which it happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Table, func, insert, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from service import outbox
from service.errors import NotFoundError
from service.ids import is_id
from service.jsonable import clean_json
from service.models import Job, JobEvent
from service.pages import of_job
from service.status import TERMINAL, JobStatus


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of job_events, for those who need no more."""

    id: int
    attempt: int
    type: str
    created_at: datetime
    data: dict[str, Any]


@dataclass(slots=True)
class News:
    """What a job has after some event."""

    over: JobStatus | None
    """The state in which the job ended, if `events` are the last ones."""
    events: list[StoredEvent] = field(default_factory=list)
    """Oldest first."""


_INSERT = insert(cast("Table", JobEvent.__table__))


def record(session: Session, job_id: str, attempt: int, event_type: str, data: dict[str, Any] | None = None) -> None:
    """Add an event. Not fenced: a run writes through `runs.add_event`.

    The job's row is locked first, in the same statement, if it is not yet: ids are drawn from a sequence, and only
    because those of one job are drawn by one transaction at a time do they become visible in their order. Who reads
    on from the last id it saw misses nothing. Webhooks that want the event get it by the same transaction.
    """
    values = {
        "job_id": Job.id,
        "attempt": literal(attempt, JobEvent.attempt.type),
        "type": literal(event_type, JobEvent.type.type),
        "data": literal(clean_json(data or {}), JSONB),
    }
    job = select(*values.values()).where(Job.id == job_id).with_for_update(key_share=True)
    session.scalars(insert(JobEvent).from_select(list(values), job).returning(JobEvent.id)).one()
    if event_type in outbox.JOB_EVENTS:
        outbox.announce(session, job_id, attempt, event_type, clean_json(data or {}))


def record_first(session: Session, job_id: str, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """The first events of a job whose row this transaction has made, in this order: types and their data."""
    of = {"job_id": job_id, "attempt": 0}
    rows = [{**of, "type": event_type, "data": clean_json(data)} for event_type, data in events]
    session.connection().execute(_INSERT, rows)


def newest(session: Session, job_id: str, before: int | None, limit: int) -> tuple[list[JobEvent], bool]:
    """Up to `limit` events with an id below `before`, newest first, and whether there are more.

    Raises NotFoundError if there is no such job.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.id.desc())
    return of_job(session, query if before is None else query.where(JobEvent.id < before), job_id, limit)


def page(session: Session, job_id: str, after: int = 0, limit: int = 100) -> tuple[list[JobEvent], bool]:
    """Up to `limit` events with an id above `after`, oldest first, and whether there are more.

    Raises NotFoundError if there is no such job.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id)
    return of_job(session, query, job_id, limit)


def stand(session: Session, job_id: str) -> tuple[JobStatus, int]:
    """The job's state and the id of its newest event. Raises NotFoundError."""
    newest = select(func.max(JobEvent.id)).where(JobEvent.job_id == Job.id).scalar_subquery()
    query = select(Job.status, newest).where(Job.id == job_id)
    found = session.execute(query).one_or_none() if is_id("job", job_id) else None
    if found is None:
        raise NotFoundError("job", job_id)
    return JobStatus(found[0]), found[1] or 0


_NEWS = text(
    """
    SELECT jobs.id AS job_id, jobs.status, event.id, event.attempt, event.type, event.created_at, event.data
    FROM unnest(CAST(:jobs AS text[]), CAST(:after AS bigint[])) AS watched (job_id, after)
    JOIN jobs ON jobs.id = watched.job_id
    LEFT JOIN LATERAL (
        SELECT * FROM job_events
        WHERE job_events.job_id = jobs.id AND job_events.id > watched.after ORDER BY job_events.id LIMIT :limit
    ) AS event ON true
    WHERE event.id IS NOT NULL OR jobs.status = ANY(:terminal)
    ORDER BY jobs.id, event.id
    """
)


def news(session: Session, after: Mapping[str, int], limit: int) -> dict[str, News]:
    """By job, up to `limit` events with ids above the given ones, and whether it is over: all of one moment, in one
    query. Jobs that go on and have no such event are left out, and so is what is no job.
    """
    parameters = {
        "jobs": list(after),
        "after": list(after.values()),
        "limit": limit,
        "terminal": [status.value for status in TERMINAL],
    }
    found: dict[str, News] = {}
    for row in session.execute(_NEWS, parameters):
        status = JobStatus(row.status)
        job = found.setdefault(row.job_id, News(status if status in TERMINAL else None))
        if row.id is not None:
            job.events.append(StoredEvent(row.id, row.attempt, row.type, row.created_at, row.data))
    for job in found.values():
        if len(job.events) == limit:
            job.over = None
    return found
