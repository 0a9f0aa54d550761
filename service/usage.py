"""What tenants hold and have held of the devices' memory: the accounts by which their turns are ordered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from sqlalchemy import ColumnElement, Double, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service import packing
from service.models import Job, TenantUsage
from service.status import JobStatus


def accounts(session: Session, tenants: Collection[str]) -> dict[str, float]:
    """`packing.account` of each of these tenants, over all devices."""
    runs: dict[str, list[tuple[int, float]]] = defaultdict(list)
    running = select(Job.tenant, Job.charged_bytes, _seconds_since(Job.claimed_at)).where(
        Job.status == JobStatus.RUNNING.value, Job.tenant.in_(tenants)
    )
    for tenant, charged, seconds in session.execute(running):
        if charged is not None:
            runs[tenant].append((charged, seconds))
    past = dict.fromkeys(tenants, 0.0)
    remembered = select(TenantUsage.tenant, TenantUsage.held_bytes, _seconds_since(TenantUsage.updated_at)).where(
        TenantUsage.tenant.in_(tenants)
    )
    for tenant, held_bytes, seconds in session.execute(remembered):
        past[tenant] = packing.forgotten(held_bytes, seconds)
    return {tenant: packing.account(past[tenant], runs[tenant]) for tenant in tenants}


def charge(session: Session, job: Job) -> None:
    """Put an attempt that ends now on its tenant's account. A job that no device was charged for costs nothing."""
    if job.charged_bytes is None or job.claimed_at is None:
        return
    seconds = session.scalars(select(_seconds_since(Job.claimed_at)).where(Job.id == job.id)).one()
    added = packing.remembered(job.charged_bytes, seconds)
    # PostgreSQL's exp() raises an error where Python's gives 0, and clocks are set back.
    constants = func.least(func.greatest(_seconds_since(TenantUsage.updated_at), 0) / packing.MEMORY_SECONDS, 500)
    kept = TenantUsage.held_bytes * func.exp(-constants)
    now = func.clock_timestamp()
    statement = insert(TenantUsage).values(tenant=job.tenant, held_bytes=added, updated_at=now)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[TenantUsage.tenant], set_={"held_bytes": kept + added, "updated_at": now}
        )
    )


def _seconds_since(moment: object) -> ColumnElement[float]:
    return func.extract("epoch", func.clock_timestamp() - moment).cast(Double)
