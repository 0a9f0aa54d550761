"""The next job of a device: claimed in one transaction, under the lock of the device's row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import TextClause, func, select, text, update
from sqlalchemy.orm import Session

from service import devices, packing, runs, usage
from service.models import Device, Job
from service.packing import Waiting
from service.runs import ClaimedJob
from service.status import JobStatus

Held = Mapping[tuple[str, int], int]
"""Caps in bytes by job id and attempt."""


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
    held = {**_running(session, device_id), **held_here()}
    free_bytes = device.memory_bytes - sum(held.values())
    missed: list[str] = []
    while True:
        waiting = _waiting(session, device, missed)
        accounts = usage.accounts(session, {job.tenant for job in waiting})
        choice = packing.choose(waiting, accounts, free_bytes, patience_seconds)
        kept_free = choice.reserved is not None and choice.start is None
        device.reserved_for = choice.reserved.job_id if kept_free and choice.reserved is not None else None
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
            CAST(extract(epoch FROM clock_timestamp() - head.blocked_since) AS double precision) AS blocked_seconds
        FROM tenants CROSS JOIN LATERAL (
            SELECT id, tenant, memory_cap_bytes, blocked_since FROM jobs
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
            blocked_seconds=row.blocked_seconds,
            reserved_elsewhere=row.id in elsewhere,
        )
        for row in rows
    ]


def _running(session: Session, device_id: str) -> Held:
    query = select(Job.id, Job.attempt, Job.memory_cap_bytes).where(
        Job.status == JobStatus.RUNNING.value, Job.device_id == device_id
    )
    return {(job_id, attempt): cap for job_id, attempt, cap in session.execute(query)}


def _note_blocked(session: Session, job_id: str) -> None:
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED.value, Job.blocked_since.is_(None))
        .values(blocked_since=func.clock_timestamp()),
        execution_options={"synchronize_session": False},
    )
