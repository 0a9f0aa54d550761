"""The next job of a device: claimed in one transaction, under the lock of the device's row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta

from sqlalchemy import Double, TextClause, func, select, text, update
from sqlalchemy.orm import Session

from service import devices, packing, runs, usage
from service.models import Device, Job
from service.packing import Choice, Running, Waiting
from service.runs import ClaimedJob
from service.status import JobStatus

Held = Mapping[tuple[str, int], int]
"""Caps in bytes by job id and attempt."""
LONGEST_DRAIN_SECONDS = 365 * 86_400.0
"""A year: what a broken clock or a hopeless prediction may say is no date."""


def next_job(
    session: Session,
    device_id: str,
    worker: str,
    *,
    lease_seconds: float,
    patience_seconds: float = packing.PATIENCE_SECONDS,
    held_here: Callable[[], Held] = dict,
) -> ClaimedJob | None:
    """Take the queued job that is next on this device, if it fits beside those that hold it; None if there is none.

    `held_here` is asked, while the row is locked, for attempts that hold memory on this machine whatever the database
    knows of them. None also where the device has not announced itself.
    """
    device = devices.locked(session, device_id)
    if device is None:
        return None
    running = _running(session, device_id, held_here())
    missed: list[str] = []
    while True:
        waiting = _waiting(session, device, missed)
        accounts = usage.accounts(session, {job.tenant for job in waiting})
        choice = packing.choose(waiting, running, accounts, device.memory_bytes, patience_seconds)
        _keep_free(session, device, choice)
        if choice.blocked is not None:
            _note_blocked(session, choice.blocked.job_id)
        if choice.start is None:
            return None
        charged = packing.charged_bytes(choice.start.memory_cap_bytes, device.memory_bytes, device.slots)
        job = runs.claim(
            session, choice.start.job_id, worker, lease_seconds, device_id=device_id, charged_bytes=charged
        )
        if job is not None:
            return job
        missed.append(choice.start.job_id)  # cancelled, paused, or another device is taking it: on to the next one


def heads() -> TextClause:
    """The statement that finds the first job of each tenant's queue: two steps of an index for each of them, however
    long the queues are.

    Parameters `memory_bytes` (jobs with larger caps are skipped) and `missed` (ids to skip).
    """
    return text(
        """
        WITH RECURSIVE tenants AS (
            (SELECT tenant FROM jobs WHERE status = 'queued' ORDER BY tenant LIMIT 1)
            UNION ALL
            SELECT (
                SELECT jobs.tenant FROM jobs
                WHERE status = 'queued' AND jobs.tenant > tenants.tenant ORDER BY jobs.tenant LIMIT 1
            )
            FROM tenants WHERE tenants.tenant IS NOT NULL
        )
        SELECT head.id, head.tenant, head.memory_cap_bytes,
            CAST(extract(epoch FROM clock_timestamp() - head.blocked_since) AS double precision) AS blocked_seconds,
            head.expected_seconds
        FROM tenants CROSS JOIN LATERAL (
            SELECT id, tenant, memory_cap_bytes, blocked_since, (total_steps - step) * coalesce(
                step_seconds, CAST(plan ->> 'predicted_step_seconds' AS double precision), 'Infinity'
            ) AS expected_seconds
            FROM jobs
            WHERE status = 'queued' AND jobs.tenant = tenants.tenant
                AND memory_cap_bytes <= :memory_bytes AND id <> ALL(CAST(:missed AS text[]))
            ORDER BY id LIMIT 1
        ) AS head
        """
    )


def _waiting(session: Session, device: Device, missed: list[str]) -> list[Waiting]:
    elsewhere = devices.reserved_elsewhere(session, device.id)
    rows = session.execute(heads(), {"memory_bytes": device.memory_bytes, "missed": missed})
    return [
        Waiting(
            job_id=row.id,
            tenant=row.tenant,
            memory_cap_bytes=row.memory_cap_bytes,
            expected_seconds=row.expected_seconds,
            blocked_seconds=row.blocked_seconds,
            drain_seconds=_drain_seconds(session, device) if row.id == device.reserved_for else None,
            reserved_elsewhere=row.id in elsewhere,
        )
        for row in rows
    ]


def _running(session: Session, device_id: str, held_here: Held) -> list[Running]:
    """What holds the device, as the database and the machine have it; an attempt that both know of counts once."""
    step_seconds = func.coalesce(Job.step_seconds, Job.plan["predicted_step_seconds"].as_float())
    query = select(
        Job.id, Job.attempt, Job.memory_cap_bytes, ((Job.total_steps - Job.step) * step_seconds).cast(Double)
    ).where(Job.status == JobStatus.RUNNING.value, Job.device_id == device_id)
    rows = session.execute(query).all()
    known = {(job_id, attempt) for job_id, attempt, _, _ in rows}
    return [
        *(Running(cap, seconds) for _, _, cap, seconds in rows),
        *(Running(cap, 0.0) for attempt, cap in held_here.items() if attempt not in known),
    ]


def _keep_free(session: Session, device: Device, choice: Choice) -> None:
    """Note for whom the device is kept free, and, once for each reservation, until when others may start."""
    if choice.reserved is None or choice.start is choice.reserved:
        device.reserved_for = device.reserved_until = None
    elif device.reserved_for != choice.reserved.job_id:
        device.reserved_for = choice.reserved.job_id
        now = session.scalars(select(func.clock_timestamp())).one()
        device.reserved_until = now + timedelta(seconds=min(choice.drain_seconds, LONGEST_DRAIN_SECONDS))
    session.flush()


def _drain_seconds(session: Session, device: Device) -> float:
    until = Device.reserved_until - func.clock_timestamp()
    left = session.scalars(select(func.extract("epoch", until).cast(Double)).where(Device.id == device.id)).one()
    return 0.0 if left is None else left


def _note_blocked(session: Session, job_id: str) -> None:
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED.value, Job.blocked_since.is_(None))
        .values(blocked_since=func.clock_timestamp()),
        execution_options={"synchronize_session": False},
    )
