"""What jobs run on: announced by workers, with the memory that the caps of the jobs there may add up to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, case, delete, exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.errors import MemoryCapExceedsDeviceError
from service.models import Device, Job
from service.status import JobStatus
from service.tenancy import EVERY_TENANT, tenant_of

ANNOUNCE_SECONDS = 60.0
"""Between two announcements of a worker that lives."""
LIVE_SECONDS = 180.0
"""Silence after which a device counts as gone."""
KEEP_SECONDS = 86_400.0
"""Silence after which its row is removed: a machine's name changes with each start of it."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A device as its worker sees it."""

    id: str
    kind: str
    """`cpu` or `cuda`."""
    memory_bytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device and what the database knows to run on it."""

    id: str
    kind: str
    memory_bytes: int
    bytes_in_use: int
    slots: int
    jobs_running: int
    worker: str
    live: bool
    updated_at: datetime


def announce(session: Session, device: Announcement, worker: str) -> None:
    """Keep what the worker says of its device, and that it lives; rows of devices long gone are removed."""
    values: dict[str, Any] = {
        "kind": device.kind,
        "memory_bytes": device.memory_bytes,
        "slots": device.slots,
        "worker": worker,
        "updated_at": func.clock_timestamp(),
    }
    statement = insert(Device).values(id=device.id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=[Device.id], set_=values))
    busy = exists().where(Job.device_id == Device.id, Job.status == JobStatus.RUNNING.value)
    session.execute(
        delete(Device).where(~_heard_within(KEEP_SECONDS), ~busy), execution_options={"synchronize_session": False}
    )


def page(session: Session) -> list[DeviceState]:
    """All devices, by id."""
    running = (
        select(
            Job.device_id,
            func.sum(Job.memory_cap_bytes).label("bytes_in_use"),
            func.count().label("jobs_running"),
        )
        .where(Job.status == JobStatus.RUNNING.value)
        .group_by(Job.device_id)
        .subquery()
    )
    query = (
        select(
            Device,
            func.coalesce(running.c.bytes_in_use, 0),
            func.coalesce(running.c.jobs_running, 0),
            _heard_within(LIVE_SECONDS),
        )
        .outerjoin(running, running.c.device_id == Device.id)
        .order_by(Device.id)
    )
    return [
        DeviceState(
            id=device.id,
            kind=device.kind,
            memory_bytes=device.memory_bytes,
            bytes_in_use=int(bytes_in_use),
            slots=device.slots,
            jobs_running=jobs_running,
            worker=device.worker,
            live=live,
            updated_at=device.updated_at,
        )
        for device, bytes_in_use, jobs_running, live in session.execute(query, execution_options=EVERY_TENANT)
    ]


@dataclass(frozen=True, slots=True)
class Occupant:
    """What holds a part of a device: a job of the caller's, or all those of others there together."""

    device_id: str
    memory_cap_bytes: int
    jobs: int
    job_id: str | None
    """None for others."""
    name: str | None
    measured_peak_bytes: int | None


def occupants(session: Session) -> list[Occupant]:
    """Of all devices: the caller's own running jobs, oldest first, and what is held by those of other tenants."""
    tenant = tenant_of(session)
    own = case((Job.tenant == tenant, Job.id))
    query = (
        select(
            Job.device_id,
            func.sum(Job.memory_cap_bytes),
            func.count(),
            own,
            func.max(case((Job.tenant == tenant, func.coalesce(Job.name, Job.id)))),
            func.max(case((Job.tenant == tenant, Job.measured_peak_bytes))),
        )
        .where(Job.status == JobStatus.RUNNING.value, Job.device_id.is_not(None))
        .group_by(Job.device_id, own)
        .order_by(own.nulls_last())
    )
    rows = session.execute(query, execution_options=EVERY_TENANT)
    return [
        Occupant(device_id, int(held), jobs, job_id, name, peak) for device_id, held, jobs, job_id, name, peak in rows
    ]


@dataclass(frozen=True, slots=True)
class Queued:
    """A job of the caller's that waits, and what the service knows of why."""

    id: str
    name: str | None
    memory_cap_bytes: int
    blocked_since: datetime | None
    """When it was its turn for the first time and it did not fit."""
    kept_free: str | None
    """The device that takes nothing that would delay this job."""


def queue(session: Session, limit: int) -> tuple[list[Queued], bool]:
    """The caller's first jobs that wait, in their order, and whether there are more."""
    kept_free = select(func.min(Device.id)).where(Device.reserved_for == Job.id, _heard_within(LIVE_SECONDS))
    query = (
        select(Job.id, Job.name, Job.memory_cap_bytes, Job.blocked_since, kept_free.scalar_subquery())
        .where(Job.status == JobStatus.QUEUED.value)
        .order_by(Job.id)
        .limit(limit + 1)
    )
    rows = [Queued(*row) for row in session.execute(query)]
    return rows[:limit], len(rows) > limit


def check_cap(session: Session, memory_cap_bytes: int) -> None:
    """Whether some live device can hold a job with this cap, as far as any is known.

    Raises MemoryCapExceedsDeviceError.
    """
    largest = session.connection().scalar(_LARGEST)
    if largest is not None and memory_cap_bytes > largest:
        raise MemoryCapExceedsDeviceError(memory_cap_bytes, largest)


def live_slots(session: Session) -> int:
    """How many jobs all live devices together run at once, at most."""
    return int(session.scalar(select(func.sum(Device.slots)).where(_heard_within(LIVE_SECONDS))) or 0)


def locked(session: Session, device_id: str) -> Device | None:
    """The device, locked until the transaction ends; None if none has announced itself under this name."""
    query = select(Device).where(Device.id == device_id).with_for_update()
    return session.scalars(query, execution_options={"populate_existing": True}).one_or_none()


def reserved_elsewhere(session: Session, device_id: str) -> set[str]:
    """The jobs for which other live devices are kept free."""
    query = select(Device.reserved_for).where(
        Device.id != device_id, Device.reserved_for.is_not(None), _heard_within(LIVE_SECONDS)
    )
    return {job_id for job_id in session.scalars(query) if job_id is not None}


def _heard_within(seconds: float) -> ColumnElement[bool]:
    return Device.updated_at > func.clock_timestamp() - timedelta(seconds=seconds)


_LARGEST = select(func.max(Device.memory_bytes)).where(_heard_within(LIVE_SECONDS))
