"""Keyset pages: a part of a list, and whether there is more of it."""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.errors import NotFoundError
from service.ids import is_id
from service.models import Job

Row = TypeVar("Row")


def take(session: Session, query: Select[Row], limit: int) -> tuple[list[Row], bool]:
    """The first `limit` rows of a query for one entity, and whether it has more."""
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def of_job(session: Session, query: Select[Row], job_id: str, limit: int) -> tuple[list[Row], bool]:
    """`take` of a query for rows of a job. Raises NotFoundError if there is no such job.

    Whether there is one is asked only where no row shows it: who polls asks often.
    """
    if not is_id("job", job_id):
        raise NotFoundError("job", job_id)
    rows, more = take(session, query, limit)
    if not rows and session.scalar(select(Job.id).where(Job.id == job_id)) is None:
        raise NotFoundError("job", job_id)
    return rows, more


def newest_first(
    session: Session, query: Select[Row], identifier: InstrumentedAttribute[str], after: str | None, limit: int
) -> tuple[list[Row], bool]:
    """Up to `limit` rows created before the one whose `identifier` is `after`, and whether there are more."""
    if after is not None:
        query = query.where(identifier < after)
    return take(session, query.order_by(identifier.desc()), limit)


def oldest_first(
    session: Session, query: Select[Row], identifier: InstrumentedAttribute[str], after: str | None, limit: int
) -> tuple[list[Row], bool]:
    """Up to `limit` rows created after the one whose `identifier` is `after`, and whether there are more."""
    if after is not None:
        query = query.where(identifier > after)
    return take(session, query.order_by(identifier), limit)
