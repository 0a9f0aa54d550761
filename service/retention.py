"""What is kept for how long: metrics, events and checkpoints of jobs that are over, and at last the jobs.

Off unless the operator sets it (Settings.keep_*_days). One sweeper at a time does it, in transactions that are short:
each takes an advisory lock, changes a bounded number of rows, and the files go after its commit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from typing import Any, Self

from sqlalchemy import ColumnElement, Engine, Select, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from service import base_models, database, deletions, uploads
from service.errors import CheckpointInUseError, JobUnfinishedError, ModelInUseError, NotFoundError
from service.models import Checkpoint, Job, JobEvent, Metric, Model
from service.settings import Settings
from service.status import TERMINAL
from service.storage import Storage, job_dir

LOCK_KEY = 0x511_0B50
"""Of the advisory lock. Not the sweeper's own: expired leases must not wait for this."""
POINTS = 1_000
"""Of a curve that is thinned out, about; validation losses, the first point and the last stay beside them."""
PASSING_EVENTS = ("checkpoint", "evaluation")
"""Of which a job has any number, and which its curve and its checkpoints say as well."""
ROWS_AT_ONCE = 10_000
JOBS_AT_ONCE = 20
FOLDERS_AT_ONCE = 20

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Pruned:
    """How much went, or would go."""

    metrics: int = 0
    """Rows. Of a dry run: not counted, which would take long."""
    events: int = 0
    thinned_jobs: int = 0
    checkpoints: int = 0
    jobs: int = 0

    @property
    def anything(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))

    def __add__(self, other: Self) -> Self:
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)}
        return type(self)(**sums)


class _BusyError(Exception):
    """Another process is at it."""


def prune(bind: Engine, files: Storage, settings: Settings) -> Pruned:
    """Delete some of what has had its time; nothing where none is set. To be called until it finds nothing.

    Raises SQLAlchemyError, OSError.
    """
    done = Pruned()
    try:
        if settings.keep_jobs_days is not None:
            done.jobs = _delete_jobs(bind, files, settings.keep_jobs_days)
        if settings.keep_checkpoints_days is not None:
            done.checkpoints = _delete_checkpoints(bind, files, settings.keep_checkpoints_days)
        if settings.keep_metrics_days is not None:
            done += _thin_out(bind, settings.keep_metrics_days)
    except _BusyError:
        pass
    if done.anything:
        logger.info(
            "retention: deleted %d jobs, %d checkpoints, %d points and %d events of %d jobs",
            *(done.jobs, done.checkpoints, done.metrics, done.events, done.thinned_jobs),
        )
    return done


def due(session: Session, settings: Settings) -> Pruned:
    """What would be deleted now; of curves only of how many jobs."""
    found = Pruned()
    if settings.keep_jobs_days is not None:
        found.jobs = _count(session, _old_jobs(settings.keep_jobs_days))
    if settings.keep_checkpoints_days is not None:
        found.checkpoints = _count(session, _old_checkpoints(settings.keep_checkpoints_days))
    if settings.keep_metrics_days is not None:
        found.thinned_jobs = _count(session, _jobs_to_thin(settings.keep_metrics_days))
    return found


def _count(session: Session, rows: Any) -> int:
    return session.scalar(select(func.count()).select_from(rows.subquery())) or 0


@contextmanager
def _locked(bind: Engine) -> Iterator[Session]:
    with database.transaction(bind) as session:
        if not database.try_lock(session, LOCK_KEY):
            raise _BusyError
        yield session


def _is_over_since(days: float) -> ColumnElement[bool]:
    over = Job.status.in_([status.value for status in TERMINAL])
    return and_(over, Job.finished_at <= func.now() - timedelta(days=days))


# Jobs


def _old_jobs(days: float) -> Select[str]:
    used = or_(
        base_models.users(Model.id, Model.path, aliased(Job)).exists(), base_models.preparations(Model.path).exists()
    )
    in_use = select(Model.id).where(Model.job_id == Job.id, used).exists()
    return select(Job.id).where(_is_over_since(days), ~in_use)


def _delete_jobs(bind: Engine, files: Storage, days: float) -> int:
    with _locked(bind) as session:
        old = list(session.scalars(_old_jobs(days).order_by(Job.finished_at).limit(JOBS_AT_ONCE)))
    return sum(_delete(bind, files, job_dir(each), partial(deletions.delete_job, job_id=each)) for each in old)


def _delete(bind: Engine, files: Storage, folder: str, rows: Callable[[Session], str]) -> bool:
    """Rows, then files, whatever dies in between; whether they went."""
    uploads.leave(files, folder)
    try:
        with _locked(bind) as session:
            rows(session)
    except (NotFoundError, JobUnfinishedError, ModelInUseError, CheckpointInUseError):  # since the look
        return False
    uploads.remove_left(files, folder)
    return True


# Checkpoints


def _old_checkpoints(days: float) -> Select[str, int, str]:
    output = select(Model.id).where(Model.job_id == Checkpoint.job_id, Model.step == Checkpoint.step).exists()
    has_output = select(Model.id).where(Model.job_id == Checkpoint.job_id).exists()
    other = aliased(Checkpoint)
    later = select(other.step).where(other.job_id == Checkpoint.job_id, other.step > Checkpoint.step).exists()
    return (
        select(Checkpoint.job_id, Checkpoint.step, Checkpoint.path)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(_is_over_since(days), ~Checkpoint.is_best, ~output, or_(has_output, later))
    )


def _delete_checkpoints(bind: Engine, files: Storage, days: float) -> int:
    with _locked(bind) as session:
        old = session.execute(_old_checkpoints(days).order_by(Job.finished_at).limit(FOLDERS_AT_ONCE)).all()
    return sum(
        _delete(bind, files, path, partial(deletions.delete_checkpoint, job_id=job_id, step=step))
        for job_id, step, path in old
    )


# Metrics and events


def _jobs_to_thin(days: float) -> Select[str]:
    return select(Job.id).where(_is_over_since(days), Job.thinned_at.is_(None))


def _thin_out(bind: Engine, days: float) -> Pruned:
    with _locked(bind) as session:
        old = list(session.scalars(_jobs_to_thin(days).order_by(Job.finished_at).limit(JOBS_AT_ONCE)))
    done = Pruned()
    for job_id in old:
        with _locked(bind) as session:
            points, events = _thin_curve(session, job_id), _forget_events(session, job_id)
            if points < ROWS_AT_ONCE and events < ROWS_AT_ONCE:
                session.execute(update(Job).where(Job.id == job_id).values(thinned_at=func.clock_timestamp()))
                done.thinned_jobs += 1
        done.metrics += points
        done.events += events
        if done.metrics + done.events >= ROWS_AT_ONCE:
            break  # the others next time: leases are looked after meanwhile
    return done


def _thin_curve(session: Session, job_id: str) -> int:
    """Delete points, up to ROWS_AT_ONCE; returns how many. Which ones stay depends on the last step alone, so that it
    does not matter in how many goes."""
    mine = Metric.job_id == job_id
    first, last = session.execute(select(func.min(Metric.step), func.max(Metric.step)).where(mine)).one()
    every = math.ceil((last or 0) / POINTS)
    if every <= 1:
        return 0
    surplus = (
        select(Metric.step)
        .where(mine, Metric.step % every != 0, Metric.step.not_in((first, last)), Metric.validation_loss.is_(None))
        .order_by(Metric.step)
        .limit(ROWS_AT_ONCE)
    )
    gone = delete(Metric).where(mine, Metric.step.in_(surplus)).returning(Metric.step)
    return len(session.scalars(gone, execution_options={"synchronize_session": False}).all())


def _forget_events(session: Session, job_id: str) -> int:
    """Delete passing events, up to ROWS_AT_ONCE; returns how many."""
    passing = select(JobEvent.id).where(JobEvent.job_id == job_id, JobEvent.type.in_(PASSING_EVENTS))
    gone = delete(JobEvent).where(JobEvent.id.in_(passing.order_by(JobEvent.id).limit(ROWS_AT_ONCE)))
    statement = gone.returning(JobEvent.id)
    return len(session.scalars(statement, execution_options={"synchronize_session": False}).all())
