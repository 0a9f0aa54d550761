"""The log of a job: what happened to it, in the transaction in which it happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from service.jsonable import clean_json
from service.models import JobEvent
from service.pages import of_job


def record(session: Session, job_id: str, attempt: int, event_type: str, data: dict[str, Any] | None = None) -> None:
    """Add an event. Not fenced: a run writes through `runs.add_event`."""
    record_all(session, job_id, attempt, [(event_type, data or {})])


def record_all(session: Session, job_id: str, attempt: int, events: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Add events in this order: types and their data."""
    of = {"job_id": job_id, "attempt": attempt}
    rows = [{**of, "type": event_type, "data": clean_json(data)} for event_type, data in events]
    session.execute(insert(JobEvent).values(rows))


def page(session: Session, job_id: str, after: int = 0, limit: int = 100) -> tuple[list[JobEvent], bool]:
    """Up to `limit` events with an id above `after`, oldest first, and whether there are more.

    Raises NotFoundError if there is no such job.
    """
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after).order_by(JobEvent.id)
    return of_job(session, query, job_id, limit)
