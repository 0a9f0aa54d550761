"""The loss curve of a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, inspect, select
from sqlalchemy.orm import Session

from service.models import Metric
from service.pages import of_job


def page(session: Session, job_id: str, after_step: int = -1, limit: int = 1_000) -> tuple[list[Metric], bool]:
    """Up to `limit` rows with a step above `after_step`, by step, and whether there are more.

    Raises NotFoundError if there is no such job.
    """
    query = select(Metric).where(Metric.job_id == job_id, Metric.step > after_step).order_by(Metric.step)
    return of_job(session, query, job_id, limit)


def between(session: Session, job_id: str, after_step: int, last_step: int, limit: int) -> list[Row[Any]]:
    """Up to `limit` rows of the steps above `after_step`, up to `last_step`, by step: plain ones, which cost less than
    the ORM's objects. None of a job that is gone.
    """
    columns = [getattr(Metric, attribute.key) for attribute in inspect(Metric).column_attrs]
    steps = (Metric.step > after_step, Metric.step <= last_step)
    query = select(*columns).where(Metric.job_id == job_id, *steps).order_by(Metric.step).limit(limit)
    return list(session.execute(query))


def losses_at(session: Session, job_id: str, steps: Sequence[int]) -> dict[int, float | None]:
    """Training loss of these steps, as far as they have a row."""
    query = select(Metric.step, Metric.loss).where(Metric.job_id == job_id, Metric.step.in_(steps))
    return dict(session.execute(query).all())
