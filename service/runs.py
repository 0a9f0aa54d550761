"""Jobs from the side of the process that runs them: claim, heartbeat, reports, the end.

Every write is fenced: it holds only while the job is `running` under the caller's attempt number, else FencedError,
upon which a supervisor kills its trainer. Every function works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service import events, storage, usage
from service.errors import FencedError
from service.failures import PAUSING, job_error
from service.ids import new_id
from service.jobs import planned_anew
from service.jsonable import clean_json, finite
from service.models import Checkpoint, Job, Metric, Model
from service.preparations import source_path
from service.status import READY, TRANSITIONS, Desired, JobStatus

OWN_LAYOUT = "slimtune"
"""Of checkpoints, in the words of slim_core.weights.layout."""
BYTES_KEY = "bytes"
"""Of jobs that read bytes (Tokenization.key)."""
MAX_FAILURES = 3
"""Attempts in a row without a new checkpoint after which a crashing job is given up."""
TYPICAL_STEPS = 20
"""The latest steps, whose median says how long the others will take."""
MAX_LOST_LEASES = 10
"""The same where the worker vanished: seldom the job's fault, but a job that kills its worker must end too."""

FINISHED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.PAUSED})


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """What a supervisor needs to run one attempt. Paths are relative to the data folder."""

    id: str
    attempt: int
    train: dict[str, Any]
    model_config: dict[str, Any]
    plan: dict[str, Any]
    memory_cap_bytes: int
    keep: int
    """Checkpoints to keep."""
    step: int
    memory_replans: int
    failures: int
    dataset_path: str
    validation_path: str | None
    initial_weights_path: str | None
    """Checkpoint folder of the base model; None for new weights."""
    tokenizer_key: str
    """Which token folders of the datasets it reads."""
    tokenizer_path: str | None
    """Folder of its tokenizer; None for bytes."""
    checkpoints_dir: str
    """Of this attempt alone."""
    names: dict[str, Any]
    """For the card of its checkpoints (slim_core.origin.Names)."""
    trace: str | None = None
    """W3C traceparent of the request that made it."""


@dataclass(frozen=True, slots=True)
class OutputModel:
    """Which registered checkpoint a succeeded job's output is."""

    step: int
    path: str
    """Relative to the data folder."""


def claim(
    session: Session,
    job_id: str,
    worker: str,
    lease_seconds: float,
    *,
    device_id: str | None = None,
    charged_bytes: int | None = None,
) -> ClaimedJob | None:
    """Take this queued job for a new attempt; None if it is not queued or another worker is taking it now.

    Whether its turn has come and the device has room for it is for the caller to know (claims.next_job).
    """
    candidate = (
        select(Job.id)
        .where(Job.id == job_id, Job.status == JobStatus.QUEUED.value)
        .with_for_update(skip_locked=True)
        .cte("candidate")
    )
    statement = (
        update(Job)
        .where(Job.id == candidate.c.id)
        .values(
            status=JobStatus.RUNNING.value,
            attempt=Job.attempt + 1,
            lease_until=_lease(lease_seconds),
            worker=worker,
            started_at=func.coalesce(Job.started_at, func.clock_timestamp()),
            device_id=device_id,
            charged_bytes=charged_bytes,
            claimed_at=func.clock_timestamp(),
            blocked_since=None,
        )
        .returning(Job)
    )
    job = session.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        return None
    events.record(session, job.id, job.attempt, "started", {"worker": worker, "step": job.step})
    return ClaimedJob(
        id=job.id,
        attempt=job.attempt,
        train=job.train,
        model_config=job.model_config,
        plan=job.plan,
        memory_cap_bytes=job.memory_cap_bytes,
        keep=int(job.spec.get("keep", 2)),
        step=job.step,
        memory_replans=job.memory_replans,
        failures=job.failures,
        dataset_path=source_path(session, job.dataset_id),
        validation_path=source_path(session, job.validation_dataset_id) if job.validation_dataset_id else None,
        initial_weights_path=_model_path(session, job.base_model_id) if job.base_model_id else None,
        tokenizer_key=job.tokenizer_key,
        tokenizer_path=job.tokenizer_path,
        checkpoints_dir=storage.attempt_dir(job.id, job.attempt),
        names=_names(job),
        trace=job.trace,
    )


def renew(session: Session, job_id: str, attempt: int, lease_seconds: float) -> Desired:
    """Extend the lease, counted from now by the database's clock; returns what the user wants. Raises FencedError."""
    return Desired(fenced_update(session, job_id, attempt, lease_until=_lease(lease_seconds)).desired)


def add_event(session: Session, job_id: str, attempt: int, event_type: str, data: dict[str, Any] | None = None) -> None:
    """Log something about the run. Raises FencedError."""
    hold(session, job_id, attempt)
    events.record(session, job_id, attempt, event_type, data)


def record_metrics(session: Session, job_id: str, attempt: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Store steps as the trainer reports them and move the job's progress to the last one. Raises FencedError.

    Each row has step, loss, learning_rate, grad_norm, step_seconds, tokens, peak_bytes; other keys are ignored.
    """
    by_step = {row["step"]: row for row in rows}
    if not by_step:
        return
    last = by_step[max(by_step)]
    peak = max((row["peak_bytes"] for row in by_step.values() if row.get("peak_bytes") is not None), default=None)
    fenced_update(
        session,
        job_id,
        attempt,
        step=last["step"],
        tokens=last["tokens"],
        loss=finite(last["loss"]),
        step_seconds=finite(last["step_seconds"]),
        measured_peak_bytes=func.greatest(Job.measured_peak_bytes, peak),
    )
    values = [
        {
            "job_id": job_id,
            "step": row["step"],
            "attempt": attempt,
            "loss": finite(row["loss"]),
            "learning_rate": finite(row["learning_rate"]),
            "grad_norm": finite(row["grad_norm"]),
            "step_seconds": finite(row["step_seconds"]),
            "tokens": row["tokens"],
            "peak_bytes": row.get("peak_bytes"),
        }
        for row in by_step.values()
    ]
    _upsert_metrics(session, values, tuple(values[0])[2:])
    session.execute(update(Job).where(Job.id == job_id).values(typical_step_seconds=_typical_seconds(job_id, attempt)))


def record_evaluation(session: Session, job_id: str, attempt: int, step: int, loss: float) -> None:
    """Store the validation loss (nats per token) after `step`. Raises FencedError."""
    hold(session, job_id, attempt)
    values = {"job_id": job_id, "step": step, "attempt": attempt, "validation_loss": finite(loss)}
    _upsert_metrics(session, [values], ("attempt", "validation_loss"))
    events.record(session, job_id, attempt, "evaluation", {"step": step, "loss": loss})


def record_probe(session: Session, job_id: str, attempt: int, peak_bytes: int) -> None:
    """Store the peak of the planned step's first micro-batch. Raises FencedError."""
    fenced_update(session, job_id, attempt, probed_peak_bytes=peak_bytes)
    events.record(session, job_id, attempt, "probed", {"peak_bytes": peak_bytes})


def record_gradient_check(session: Session, job_id: str, attempt: int, peak_bytes: int, check: dict[str, Any]) -> None:
    """Store what the finished job's certificate says of the gradient; its peak counts. Raises FencedError."""
    peak = func.greatest(Job.measured_peak_bytes, peak_bytes)
    fenced_update(session, job_id, attempt, gradient_check=clean_json(check), measured_peak_bytes=peak)


def finish(
    session: Session,
    job_id: str,
    attempt: int,
    status: JobStatus | str,
    *,
    error: dict[str, Any] | None = None,
    output_model: OutputModel | None = None,
) -> Job:
    """End the run: succeeded, failed (with `error`), cancelled or paused. Raises FencedError, ValueError.

    A succeeded job's newest checkpoint becomes a model, unless `output_model` names another. A pause that the user
    took back meanwhile ends in `queued`, one followed by a cancel in `cancelled`.
    """
    status = JobStatus(status)
    if status not in FINISHED:
        raise ValueError(f"status: a run cannot finish as {status.value}")
    job = hold(session, job_id, attempt)
    if status is JobStatus.PAUSED:
        status = _resting_status(job.desired, JobStatus.PAUSED)
    data: dict[str, Any] = {"step": job.step}
    values: dict[str, Any] = {}
    if status is JobStatus.SUCCEEDED:
        values["output_model_id"] = data["output_model"] = _create_output(session, job, output_model)
    if error is not None:
        values["error"] = data["error"] = clean_json(error)
    ended = _leave_running(session, job, status, values)
    events.record(session, job_id, attempt, "requeued" if status is JobStatus.QUEUED else status.value, data)
    return ended


def release(
    session: Session,
    job_id: str,
    attempt: int,
    reason: str,
    *,
    progressed: bool,
    plan: dict[str, Any] | None = None,
    max_failures: int = MAX_FAILURES,
    error: dict[str, Any] | None = None,
) -> Job:
    """Give the job back for another attempt. Raises FencedError.

    Without progress (a new checkpoint) this counts as a failure, and the `max_failures`-th in a row fails the job with
    code attempts_exhausted and `error` as its cause. With a new `plan` it is a memory replan, counted in
    `memory_replans` instead. A full disk, or an object store that is away, pauses the job and counts as
    nothing. A cancel or pause that the user asked for takes effect here.
    """
    job = hold(session, job_id, attempt)
    if plan is not None:
        values: dict[str, Any] = {
            **planned_anew(plan),
            "memory_replans": Job.memory_replans + 1,
        }
        events.record(session, job_id, attempt, "replanned", {"chunk_length": plan.get("chunk_length")})
        return _give_back(session, job, reason, failures=job.failures, max_failures=None, values=values, error=error)
    failures = 0 if progressed else job.failures + (0 if _waits_for_a_person(error) else 1)
    return _give_back(session, job, reason, failures=failures, max_failures=max_failures, values={}, error=error)


def requeue_expired(
    session: Session, max_failures: int = MAX_LOST_LEASES, *, log_of: Callable[[str, int], list[str]] | None = None
) -> list[str]:
    """Take back the jobs whose lease ran out; returns those that wait for a worker again.

    An attempt that registered no checkpoint counts as a failure, as in `release`. `log_of` is asked for the last lines
    of the log of a job's attempt, which nobody else is there to report.
    """
    query = (
        select(Job)
        .where(Job.status == JobStatus.RUNNING.value, Job.lease_until < func.clock_timestamp())
        .order_by(Job.id)
        .with_for_update(skip_locked=True, key_share=True)
    )
    requeued = []
    for job in session.scalars(query, execution_options={"populate_existing": True}).all():
        mine = select(Checkpoint.step).where(Checkpoint.job_id == job.id, Checkpoint.attempt == job.attempt).limit(1)
        failures = 0 if session.scalar(mine) is not None else job.failures + 1
        error = job_error("worker_lost", "The worker stopped renewing its lease.", job.step)
        if log_of is not None and (log := log_of(job.id, job.attempt)):
            data = {"status": None, "signal": None, "error": error, "log": log}
            events.record(session, job.id, job.attempt, "trainer_failed", data)
        given_back = _give_back(
            session, job, "lease_expired", failures=failures, max_failures=max_failures, values={}, error=error
        )
        if given_back.status == JobStatus.QUEUED:
            requeued.append(job.id)
    return requeued


def hold(session: Session, job_id: str, attempt: int) -> Job:
    """The fence for writes beside the job's row: the row, locked until the transaction ends. Raises FencedError."""
    query = select(Job).where(*_fence(job_id, attempt)).with_for_update(key_share=True)
    job = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise FencedError(job_id, attempt)
    return job


def fenced_update(session: Session, job_id: str, attempt: int, **values: Any) -> Job:
    """The fence for writes to the job's row. Raises FencedError."""
    statement = update(Job).where(*_fence(job_id, attempt)).values(values).returning(Job)
    job = session.scalars(statement, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise FencedError(job_id, attempt)
    return job


def _fence(job_id: str, attempt: int) -> tuple[ColumnElement[bool], ...]:
    return Job.id == job_id, Job.attempt == attempt, Job.status == JobStatus.RUNNING.value


def _lease(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def _names(job: Job) -> dict[str, Any]:
    validation = job.validation_dataset_id
    if validation is None and (fraction := job.train.get("validation_fraction")):
        validation = f"{fraction:.0%} of the documents, which are not trained on"
    return {
        "model": job.name or f"{job.model} of {job.id}",
        "base_model": job.model if job.base_model_id is not None else None,
        "data": job.dataset_id,
        "validation": validation,
        "tokenizer": job.tokenizer_id or job.tokenizer_key,
        "memory_cap_bytes": job.memory_cap_bytes,
    }


def _model_path(session: Session, model_id: str) -> str:
    return session.scalars(select(Model.path).filter_by(id=model_id)).one()


def _upsert_metrics(session: Session, values: list[dict[str, Any]], replaced: tuple[str, ...]) -> None:
    statement = insert(Metric).values(values)
    excluded = {name: statement.excluded[name] for name in replaced}
    session.execute(statement.on_conflict_do_update(index_elements=[Metric.job_id, Metric.step], set_=excluded))


def _typical_seconds(job_id: str, attempt: int) -> ScalarSelect[Any]:
    mine = (Metric.job_id == job_id, Metric.attempt == attempt, Metric.step_seconds.is_not(None))
    latest = select(Metric.step_seconds).where(*mine).order_by(Metric.step.desc()).limit(TYPICAL_STEPS).subquery()
    return select(func.percentile_cont(0.5).within_group(latest.c.step_seconds)).scalar_subquery()


def _resting_status(desired: str, otherwise: JobStatus) -> JobStatus:
    """Where a run that stops before its end comes to rest, by what the user wants now."""
    by_desired = {Desired.CANCEL: JobStatus.CANCELLED, Desired.PAUSE: JobStatus.PAUSED, Desired.RUN: JobStatus.QUEUED}
    return by_desired.get(Desired(desired), otherwise)


def _leave_running(session: Session, job: Job, status: JobStatus, values: dict[str, Any]) -> Job:
    """The one way out of `running`."""
    usage.charge(session, job)
    values = {**values, "status": status.value, "lease_until": None, "worker": None}
    if not TRANSITIONS[status]:
        values["finished_at"] = func.clock_timestamp()
    return fenced_update(session, job.id, job.attempt, **values)


def _give_back(
    session: Session,
    job: Job,
    reason: str,
    *,
    failures: int,
    max_failures: int | None,
    values: dict[str, Any],
    error: dict[str, Any] | None,
) -> Job:
    status = _resting_status(job.desired, JobStatus.QUEUED)
    data: dict[str, Any] = {"reason": reason, "failures": failures, "step": job.step}
    if _waits_for_a_person(error) and status is not JobStatus.CANCELLED:
        status = JobStatus.PAUSED
        values |= {"desired": Desired.PAUSE.value, "error": clean_json(error)}
    elif status is JobStatus.QUEUED and max_failures is not None and failures >= max_failures:
        status = JobStatus.FAILED
        cause = f" The last one: {error['message']}" if error and error.get("message") else ""
        message = f"{failures} attempts in a row ended without a new checkpoint ({reason}).{cause}"
        hint = (error or {}).get("hint")
        values["error"] = clean_json(job_error("attempts_exhausted", message, job.step, hint, cause=error))
    if status is JobStatus.QUEUED:
        data["error"] = error  # of the attempt
    else:  # of the job: one that rests because it was asked to has none
        data |= {"error": values.get("error"), "cause": error if "error" not in values else None}
    data = {name: value for name, value in data.items() if value is not None}
    given_back = _leave_running(session, job, status, {**values, "failures": failures})
    events.record(session, job.id, job.attempt, "requeued" if status is JobStatus.QUEUED else status.value, data)
    return given_back


def _waits_for_a_person(error: dict[str, Any] | None) -> bool:
    return error is not None and error["code"] in PAUSING


def _create_output(session: Session, job: Job, output: OutputModel | None) -> str:
    if output is None:
        newest = select(Checkpoint).where(Checkpoint.job_id == job.id).order_by(Checkpoint.step.desc()).limit(1)
        checkpoint = session.scalars(newest).one_or_none()
        if checkpoint is None:
            raise ValueError("output_model: a job without a checkpoint cannot succeed")
        output = OutputModel(checkpoint.step, checkpoint.path)
    base = session.get(Model, job.base_model_id) if job.base_model_id else None
    has_tokenizer = job.tokenizer_key != BYTES_KEY
    model = Model(
        id=new_id("model"),
        tenant=job.tenant,
        name=job.name or f"{job.model} of {job.id}",
        kind="output",
        status=READY,
        # A checkpoint is written as the model that it started from was, if that can describe it.
        layout=base.layout if base is not None and base.config == job.model_config else OWN_LAYOUT,
        tokenizer_key=job.tokenizer_key if has_tokenizer else None,
        tokenizer_path=output.path if has_tokenizer else None,
        job_id=job.id,
        step=output.step,
        config=job.model_config,
        path=output.path,
    )
    session.add(model)
    session.flush()
    return model.id
