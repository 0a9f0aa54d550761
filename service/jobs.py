"""Jobs from the user's side: create, look, cancel, pause, resume. The run's side is runs.py.

Every function works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import ARRAY, Engine, Row, Table, Text, bindparam, func, insert, select, update
from sqlalchemy.orm import Session, defer

from service import base_models, database, datasets, events, quotas, tokenizations, tokenizers, tracing
from service.errors import JobStateConflictError, NotFoundError
from service.ids import is_id, new_id
from service.models import Job
from service.pages import newest_first
from service.status import REQUESTS, TERMINAL, Action, Desired, JobStatus
from service.tokenizers import TokenizerRef

_NEW = insert(Job).returning(Job)


def create(
    session: Session,
    *,
    spec: dict[str, Any],
    train: dict[str, Any],
    model_config: dict[str, Any],
    plan: dict[str, Any],
    memory_cap_bytes: int,
    dataset_id: str,
    validation_dataset_id: str | None = None,
    base_model_id: str | None = None,
    tokenizer: TokenizerRef = tokenizers.BYTES,
    tenant: str | None = None,
    request_id: str | None = None,
) -> Job:
    """A new queued job with its first events, the first of which names the request that asked for it.

    `name`, `model` and `metadata` come from `spec`. The attempts at it will be part of the trace that this is in. The
    tokens of its datasets are made by the preparer, unless the trainer is first. It belongs to the session's tenant,
    unless `tenant` names one. Raises NotFoundError if a dataset, the base model or the tokenizer is gone: their rows
    stay locked against deletion until the transaction ends. Raises TooManyJobsError, StorageQuotaExceededError.
    """
    quotas.admit_job(session)
    for identifier in filter(None, (dataset_id, validation_dataset_id)):
        datasets.keep(session, identifier)
        if tokenizer != tokenizers.BYTES:  # which were asked for when the dataset came
            tokenizations.request(session, identifier, tokenizer)
    if base_model_id is not None:
        base_models.get(session, base_model_id, keep=True)
    values = {
        "id": new_id("job"),
        "name": spec.get("name"),
        "status": JobStatus.QUEUED.value,
        "desired": Desired.RUN.value,
        "spec": spec,
        "train": train,
        "model_config": model_config,
        "plan": plan,
        "memory_cap_bytes": memory_cap_bytes,
        "dataset_id": dataset_id,
        "validation_dataset_id": validation_dataset_id,
        "base_model_id": base_model_id,
        "model": spec["model"],
        "total_steps": train["steps"],
        "predicted_peak_bytes": plan["predicted_peak_bytes"],
        "job_metadata": spec.get("metadata") or {},
        "tenant": tenant or database.tenant_of(session),
        "tokenizer_key": tokenizer.key,
        "tokenizer_path": tokenizer.path,
        "tokenizer_id": tokenizer.name if is_id("tok", tokenizer.name) else None,
        "trace": tracing.traceparent(),
    }
    job = session.scalars(_NEW, [values]).one()
    queued = {} if request_id is None else {"request_id": request_id}
    planned = ("chunk_length", "num_chunks", "state_policy", "micro_batch_size", "predicted_peak_bytes", "reason")
    planned_as = {name: plan[name] for name in planned if name in plan}
    events.record_first(session, job.id, [("queued", queued), ("planned", planned_as)])
    return job


def get(session: Session, job_id: str) -> Job:
    """The job. Raises NotFoundError."""
    job = session.get(Job, job_id, populate_existing=True) if is_id("job", job_id) else None
    if job is None:
        raise NotFoundError("job", job_id)
    return job


_SHOWN = (
    *("id", "status", "desired", "attempt", "created_at", "started_at", "finished_at", "spec", "plan", "error"),
    *("memory_cap_bytes", "predicted_peak_bytes", "probed_peak_bytes", "measured_peak_bytes", "gradient_check"),
    *("step", "total_steps", "tokens", "loss", "step_seconds", "typical_step_seconds", "output_model_id"),
)
_JOBS = cast("Table", Job.__table__)
_LOOK = select(*(_JOBS.c[name] for name in (*_SHOWN, "tenant"))).where(
    _JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Text())))
)


def look(bind: Engine, asked: Collection[tuple[str, str]]) -> dict[tuple[str, str], Row[Any]]:
    """What is shown of jobs, asked for by their tenants: pairs of tenant and id. What is not there is left out.

    The query that is asked most often by far: one statement that is a transaction of its own, past the ORM, which takes
    several times as long as the database. So no session restricts it to the tenant: it does so itself.
    """
    with database.autocommitting(bind).connect() as connection:
        rows = connection.execute(_LOOK, {"ids": list({job_id for _, job_id in asked})}).all()
    found = {(row.tenant, row.id): row for row in rows}
    return {each: found[each] for each in asked if each in found}


def page(
    session: Session,
    status: str | None = None,
    after: str | None = None,
    limit: int = 20,
    metadata: dict[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """Up to `limit` jobs older than the job `after`, newest first, and whether there are more.

    Only those in `status`, and with all of `metadata` ({}: with none at all), where these are given. Without `train`
    and `model_config`.
    """
    # What only the trainer reads is most of a row, and a page has up to a hundred.
    query = select(Job).options(defer(Job.train, raiseload=True), defer(Job.model_config, raiseload=True))
    if status is not None:
        query = query.where(Job.status == status)
    if metadata is not None:
        query = query.where(Job.job_metadata.contains(metadata) if metadata else Job.job_metadata == {})
    return newest_first(session, query, Job.id, after, limit)


def unfinished(session: Session) -> dict[JobStatus, int]:
    """How many jobs are in each of the states that are no end; there are never as many as there have been jobs."""
    states = [status for status in JobStatus if status not in TERMINAL]
    query = select(Job.status, func.count()).where(Job.status.in_(states)).group_by(Job.status)
    counts = {JobStatus(status): count for status, count in session.execute(query)}
    return {status: counts.get(status, 0) for status in states}


@dataclass(frozen=True, slots=True)
class NewCap:
    """What a paused job goes on under."""

    memory_cap_bytes: int
    plan: dict[str, Any]


def request(session: Session, job_id: str, action: Action, new_cap: Callable[[Job], NewCap] | None = None) -> Job:
    """Cancel, pause or resume, by the table in status.py. Asking again for what is already so changes nothing.

    A job that no worker holds changes at once; a running one is told at its next heartbeat. With `new_cap`, which is
    asked while the job's row is locked, a paused job is planned anew; in any other state that is a conflict.
    Raises NotFoundError, JobStateConflictError, and what `new_cap` raises.
    """
    job = _locked(session, job_id)
    before = JobStatus(job.status), Desired(job.desired)
    outcome = REQUESTS.get((action, *before))
    if outcome is None or (new_cap is not None and before[0] is not JobStatus.PAUSED):
        raise JobStateConflictError(job_id, action, job.status, job.desired)
    if outcome == before:
        return job
    status, desired = outcome
    values: dict[str, Any] = {"status": status.value, "desired": desired.value, "blocked_since": None}
    if status in TERMINAL:
        values["finished_at"] = func.clock_timestamp()
    if before[0] is JobStatus.PAUSED:
        values["error"] = None  # why it was paused, if not on request
        if status is JobStatus.QUEUED:
            values["failures"] = 0  # the user asks for a fresh try
    if new_cap is not None:
        values |= _under(job, new_cap(job))
    guard = (Job.id == job_id, Job.status == before[0].value)
    row = session.scalars(
        update(Job).where(*guard).values(values).returning(Job), execution_options={"populate_existing": True}
    ).one()
    events.record(session, job_id, row.attempt, _event_of(action, before[0], status))
    if new_cap is not None:
        data = {"memory_cap": row.memory_cap_bytes, "chunk_length": row.plan.get("chunk_length")}
        events.record(session, job_id, row.attempt, "replanned", data)
    return row


def _under(job: Job, new_cap: NewCap) -> dict[str, Any]:
    """The columns that a new cap changes."""
    return {
        "memory_cap_bytes": new_cap.memory_cap_bytes,
        "spec": {**job.spec, "memory_cap": new_cap.memory_cap_bytes},
        **planned_anew(new_cap.plan),
        "memory_replans": 0,
    }


def planned_anew(plan: dict[str, Any]) -> dict[str, Any]:
    """The columns of a job that another plan changes. The peaks and times so far were the old one's; its steps keep
    theirs."""
    return {
        "plan": plan,
        "predicted_peak_bytes": plan["predicted_peak_bytes"],
        "typical_step_seconds": None,
        "probed_peak_bytes": None,
        "measured_peak_bytes": None,
    }


def queued_ids(session: Session, limit: int = 100) -> list[str]:
    """Jobs that wait for a worker, oldest first."""
    query = select(Job.id).where(Job.status == JobStatus.QUEUED.value).order_by(Job.id).limit(limit)
    return list(session.scalars(query))


def _locked(session: Session, job_id: str) -> Job:
    if not is_id("job", job_id):
        raise NotFoundError("job", job_id)
    query = select(Job).where(Job.id == job_id).with_for_update(key_share=True)
    job = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise NotFoundError("job", job_id)
    return job


def _event_of(action: Action, before: JobStatus, after: JobStatus) -> str:
    if before is JobStatus.RUNNING:
        return f"{action}_requested"
    return {JobStatus.CANCELLED: "cancelled", JobStatus.PAUSED: "paused", JobStatus.QUEUED: "resumed"}[after]
