"""The state of the whole service in numbers, for who operates it: jobs, attempts, devices, all tenants together."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, func, literal_column, select
from sqlalchemy.orm import Session

from service import devices
from service.devices import DeviceState
from service.models import Job, JobEvent
from service.status import JobStatus

GIVEN_BACK = ("requeued", "replanned")
"""Events of attempts that ended before their job did."""


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
class Snapshot:
    """At one moment."""

    jobs: dict[str, int]
    """By status, all of them."""
    failures: dict[str, int]
    """Failed jobs by the code of their error."""
    oldest_queued_seconds: float
    """For how long the first job in the queue has been there; 0 where none is."""
    given_back: dict[str, int]
    """Attempts by why they ended: `lease_expired`, `replanned`, and the reasons of events `requeued`."""
    devices: list[DeviceState]
    running: list[RunningJob]


def snapshot(session: Session) -> Snapshot:
    """Read it, with a handful of queries over indexes. The session must be one that sees every tenant."""
    counted = select(Job.status, func.count()).group_by(Job.status)
    code = Job.error["code"].astext
    failed = select(code, func.count()).where(Job.status == JobStatus.FAILED.value).group_by(code)
    waiting = func.extract("epoch", func.clock_timestamp() - func.min(Job.created_at))
    oldest = session.scalar(select(waiting).where(Job.status == JobStatus.QUEUED.value))
    running = select(Job).where(Job.status == JobStatus.RUNNING.value).order_by(Job.id)
    return Snapshot(
        jobs=dict.fromkeys((status.value for status in JobStatus), 0) | _counts(session, counted),
        failures=_counts(session, failed),
        oldest_queued_seconds=max(0.0, float(oldest or 0)),
        given_back=_counts(session, given_back()),
        devices=devices.page(session),
        running=[_running(job) for job in session.scalars(running)],
    )


def given_back() -> Select[str, int]:
    """Reasons and counts. Index job_events_given_back has these events, of the very many that there are."""
    reason = func.coalesce(JobEvent.data["reason"].astext, JobEvent.type)
    # No parameters: that the index's condition holds is to be seen from the text.
    types: list[ColumnElement[str]] = [literal_column(f"'{name}'") for name in GIVEN_BACK]
    return select(reason, func.count()).where(JobEvent.type.in_(types)).group_by(reason)


def _counts(session: Session, query: Select[str, int]) -> dict[str, int]:
    return {name or "unknown": count for name, count in session.execute(query)}


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
