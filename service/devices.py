"""What jobs run on: announced by workers, with the memory that the caps of the jobs there may add up to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.errors import MemoryCapExceedsDeviceError
from service.models import Device, Job
from service.status import JobStatus
from service.tenancy import EVERY_TENANT

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
