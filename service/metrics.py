"""The loss curve of a job."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.models import Metric
from service.pages import of_job


def page(session: Session, job_id: str, after_step: int = -1, limit: int = 1_000) -> tuple[list[Metric], bool]:
    """Up to `limit` rows with a step above `after_step`, by step, and whether there are more.

    Raises NotFoundError if there is no such job.
    """
    query = select(Metric).where(Metric.job_id == job_id, Metric.step > after_step).order_by(Metric.step)
    return of_job(session, query, job_id, limit)


def losses_at(session: Session, job_id: str, steps: Sequence[int]) -> dict[int, float | None]:
    """Training loss of these steps, as far as they have a row."""
    query = select(Metric.step, Metric.loss).where(Metric.job_id == job_id, Metric.step.in_(steps))
    return dict(session.execute(query).all())
