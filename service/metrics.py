"""The loss curve of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, Row, func, inspect, select
from sqlalchemy.orm import Session

from service.errors import NotFoundError
from service.ids import is_id
from service.models import Job, Metric
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


@dataclass(frozen=True, slots=True)
class Curve:
    """What a job's steps did, by column, oldest first. Where there are more steps than points, each point stands for
    `width` steps in a row: the averages over them, and the least and the largest loss."""

    width: int
    step: list[int]
    """The last one of each point."""
    attempt: list[int]
    loss: list[float | None]
    lowest_loss: list[float | None]
    highest_loss: list[float | None]
    validation_loss: list[float | None]
    learning_rate: list[float | None]
    step_seconds: list[float | None]


def curve(session: Session, job_id: str, first: int, last: int | None, points: int) -> Curve:
    """The steps from `first` to `last` (None: the newest) in about so many points. Raises NotFoundError."""
    if not is_id("job", job_id):
        raise NotFoundError("job", job_id)
    ends = select(Job.id, func.least(Job.step, last)).where(Job.id == job_id)
    found = session.execute(ends).one_or_none()
    if found is None:
        raise NotFoundError("job", job_id)
    width = max(-(-(found[1] - first + 1) // points), 1)
    bucket = (Metric.step - first) // width
    losses = (func.avg(Metric.loss), func.min(Metric.loss), func.max(Metric.loss), func.avg(Metric.validation_loss))
    others = (func.avg(Metric.learning_rate), func.avg(Metric.step_seconds))
    query = (
        select(func.max(Metric.step), func.max(Metric.attempt), *(column.cast(Float) for column in (*losses, *others)))
        .where(Metric.job_id == job_id, Metric.step.between(first, found[1]))
        .group_by(bucket)
        .order_by(func.max(Metric.step))
    )
    columns = list(zip(*session.execute(query).all(), strict=True)) or [()] * 8
    return Curve(width, *(list(column) for column in columns))
