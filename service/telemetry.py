"""The state of the whole service in numbers, for who operates it: jobs, attempts, devices, all tenants together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, func, literal_column, select, text, union_all
from sqlalchemy.orm import Session

from service import devices
from service.devices import DeviceState
from service.models import (
    DeletedGivenBack,
    Job,
    JobEvent,
    Model,
    Prepared,
    Tokenization,
    Tokenizer,
    WebhookDelivery,
)
from service.status import JobStatus

GIVEN_BACK = ("requeued", "replanned")
"""Events of attempts that ended before their job did."""
RECENT_JOBS = 100
"""The newest succeeded ones, by which plans are judged."""
QUANTILES = (0.5, 0.9, 1.0)
QUEUE_LOOKED_AT = 1_000
"""Jobs of the queue, oldest first, of which the longest wait is looked for."""


@dataclass(frozen=True, slots=True)
class RunningJob:
    """What a run does, measured against its plan. Ratios and times are None until they are known."""

    id: str
    device: str
    step_seconds: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    memory_cap_bytes: int
    peak_over_predicted: float | None
    time_over_predicted: float | None


@dataclass(frozen=True, slots=True)
class PlanErrors:
    """Measured over planned, of the newest succeeded jobs: by quantile, and empty where there is none."""

    jobs: int
    peak: dict[float, float]
    time: dict[float, float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """At one moment."""

    jobs: dict[str, int]
    """By status, all of them."""
    failures: dict[str, int]
    """Failed jobs by the code of their error."""
    oldest_queued_seconds: float
    """The longest that a job has waited since it was last queued; 0 where none waits."""
    leases_overdue: int
    """Running jobs whose lease has run out, and whom nobody has taken back yet."""
    given_back: dict[str, int]
    """Attempts by why they ended: `lease_expired`, `replanned`, and the reasons of events `requeued`; also of jobs that
    are deleted."""
    preparations: dict[str, int]
    """Not ready yet, and not failed, by what is prepared."""
    deliveries_pending: int
    """Of webhooks."""
    devices: list[DeviceState]
    running: list[RunningJob]
    plan_errors: PlanErrors


def snapshot(session: Session) -> Snapshot:
    """Read it, with a handful of queries over indexes. The session must be one that sees every tenant."""
    counted = select(Job.status, func.count()).group_by(Job.status)
    code = Job.error["code"].astext
    failed = select(code, func.count()).where(Job.status == JobStatus.FAILED.value).group_by(code)
    running = select(Job).where(Job.status == JobStatus.RUNNING.value).order_by(Job.id)
    overdue = select(func.count()).where(
        Job.status == JobStatus.RUNNING.value, Job.lease_until < func.clock_timestamp()
    )
    pending = select(func.count()).where(WebhookDelivery.status == "pending")
    return Snapshot(
        jobs=dict.fromkeys((status.value for status in JobStatus), 0) | _counts(session, counted),
        failures=_counts(session, failed),
        oldest_queued_seconds=max(0.0, float(session.scalar(_LONGEST_WAIT, {"limit": QUEUE_LOOKED_AT}) or 0)),
        leases_overdue=session.scalars(overdue).one(),
        given_back=_counts(session, given_back()),
        preparations={
            "tokenization": _unfinished(session, Tokenization),
            "tokenizer": _unfinished(session, Tokenizer),
            "model": _unfinished(session, Model),
        },
        deliveries_pending=session.scalars(pending).one(),
        devices=devices.page(session),
        running=[_running(job) for job in session.scalars(running)],
        plan_errors=_plan_errors(session),
    )


_LONGEST_WAIT = text(
    """
    SELECT extract(epoch FROM clock_timestamp() - min(newest.created_at))
    FROM (SELECT id FROM jobs WHERE status = 'queued' ORDER BY id LIMIT :limit) AS queued
    CROSS JOIN LATERAL (
        SELECT created_at FROM job_events WHERE job_events.job_id = queued.id ORDER BY job_events.id DESC LIMIT 1
    ) AS newest
    """
)
"""The newest event of a job in the queue is the one that says how it came there."""


def given_back() -> Select[str, int]:
    """Reasons and counts. Index job_events_given_back has these events, of the very many that there are. One statement,
    so that an event that is deleted meanwhile counts once."""
    reason = func.coalesce(JobEvent.data["reason"].astext, JobEvent.type).label("reason")
    # No parameters: that the index's condition holds is to be seen from the text.
    types: list[ColumnElement[str]] = [literal_column(f"'{name}'") for name in GIVEN_BACK]
    live = select(reason, func.count().label("count")).where(JobEvent.type.in_(types)).group_by(reason)
    both = union_all(live, select(DeletedGivenBack.reason, DeletedGivenBack.count)).subquery()
    return select(both.c.reason, func.sum(both.c.count)).group_by(both.c.reason)


def _unfinished(session: Session, table: type[Prepared]) -> int:
    return session.scalars(select(func.count()).where(table.status.in_(("pending", "running")))).one()


def _plan_errors(session: Session) -> PlanErrors:
    predicted_seconds = Job.plan["predicted_step_seconds"].as_float()
    query = (
        select(Job.measured_peak_bytes, Job.predicted_peak_bytes, Job.typical_step_seconds, predicted_seconds)
        .where(Job.status == JobStatus.SUCCEEDED.value)
        .order_by(Job.id.desc())
        .limit(RECENT_JOBS)
    )
    rows = session.execute(query).all()
    return PlanErrors(
        jobs=len(rows),
        peak=quantiles([peak / predicted for peak, predicted, _, _ in rows if peak and predicted]),
        time=quantiles([seconds / predicted for _, _, seconds, predicted in rows if seconds and predicted]),
    )


def quantiles(values: Sequence[float]) -> dict[float, float]:
    """By `QUANTILES`, each a value that occurs (the nearest rank); empty where there are no values."""
    ordered = sorted(values)
    return {share: ordered[math.ceil(share * len(ordered)) - 1] for share in QUANTILES if ordered}


def _counts(session: Session, query: Select[str, int]) -> dict[str, int]:
    return {name or "unknown": int(count) for name, count in session.execute(query)}


def _running(job: Job) -> RunningJob:
    seconds, peak = job.typical_step_seconds, job.measured_peak_bytes
    known = seconds is not None and seconds > 0 and job.step > 0
    predicted = job.plan.get("predicted_step_seconds")
    return RunningJob(
        id=job.id,
        device=job.device_id or "",
        step_seconds=seconds,
        tokens_per_second=job.tokens / job.step / seconds if known and seconds else None,
        peak_bytes=peak,
        memory_cap_bytes=job.memory_cap_bytes,
        peak_over_predicted=None if peak is None else peak / job.predicted_peak_bytes,
        time_over_predicted=seconds / predicted if seconds and predicted else None,
    )
