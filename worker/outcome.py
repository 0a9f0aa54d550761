"""What the end of a trainer means for its job: one decision, written in one fenced transaction."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service import calibrations, runs
from service.failures import HINTS, job_error
from service.models import Job
from service.runs import ClaimedJob
from service.status import Desired, JobStatus
from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning import (
    Calibration,
    MemoryCapInfeasibleError,
    Plan,
    Workload,
    default_calibration,
    plan_with_lessons,
)
from worker.ledger import is_outage
from worker.messages import Done, Failure

FINAL_CODES = frozenset({"diverged", "dataset_invalid", "document_too_large", "model_invalid"})
"""Errors that another attempt would only repeat."""
logger = logging.getLogger(__name__)

MEMORY_CODE = "memory_cap_exceeded"
MEMORY_EXIT = 4
KILLED_HINT = (
    "the kernel kills when the machine runs out of memory: lower SLIMTUNE_DEVICE_MEMORY_BYTES, or run less beside the "
    "worker"
)
MAX_MEMORY_REPLANS = 3


@dataclass(frozen=True, slots=True)
class Ending:
    """How a trainer ended."""

    step: int
    """The last one reported."""
    status: int | None = None
    """Exit status, -N for signal N; None if there was no process."""
    done: Done | None = None
    failure: Failure | None = None
    stopped: str | None = None
    """Why the supervisor stopped it, if it did."""
    progressed: bool = False
    final_checkpoint: bool = False
    """Whether the step in `done` is registered."""
    log: list[str] = field(default_factory=list)
    """The last lines of its stderr."""


def conclude(session: Session, job: ClaimedJob, desired: Desired, ending: Ending) -> Job:
    """End the run or give the job back, as `ending` and the user's wish have it. Raises FencedError."""
    completed = ending.done is not None and ending.done.reason != "stopped" and ending.failure is None
    succeeded = completed and ending.final_checkpoint
    _learn(
        session,
        job,
        lambda held: calibrations.learn_peak(session, held, finished=succeeded, over_cap_bytes=_over(ending)),
    )
    if succeeded:
        _learn(session, job, lambda held: calibrations.learn(session, held))
        return runs.finish(session, job.id, job.attempt, JobStatus.SUCCEEDED)
    if _was_stopped(ending):
        return _rest(session, job, desired, ending)
    error = error_of(ending)
    data = {"status": ending.status, "signal": _signal_name(ending.status), "error": error, "log": ending.log}
    runs.add_event(session, job.id, job.attempt, "trainer_failed", data)
    logger.warning("the trainer failed at step %d, %s: %s", error["step"], error["code"], error["message"])
    if error["code"] == MEMORY_CODE:
        return _over_the_cap(session, job, error)
    if error["code"] in FINAL_CODES:
        return runs.finish(session, job.id, job.attempt, JobStatus.FAILED, error=error)
    return runs.release(session, job.id, job.attempt, error["code"], progressed=ending.progressed, error=error)


def _learn(session: Session, job: ClaimedJob, lesson: Callable[[Job], None]) -> None:
    held = runs.hold(session, job.id, job.attempt)
    try:
        with session.begin_nested():
            lesson(held)
    except Exception as error:  # the attempt has ended, whatever it may teach
        if isinstance(error, SQLAlchemyError) and is_outage(error):
            raise  # the end cannot be written now either; it will be tried again
        logger.exception("nothing learned from the attempt")


def _over(ending: Ending) -> int | None:
    """What an attempt held that its cap has ended."""
    error = error_of(ending)
    return error.get("peak_bytes") or 0 if error["code"] == MEMORY_CODE else None


def error_of(ending: Ending) -> dict[str, Any]:
    """The job's `error` after a trainer that failed."""
    if ending.failure is not None:
        failure = ending.failure
        code = MEMORY_CODE if ending.status == MEMORY_EXIT else failure.code
        step = ending.step if failure.step is None else failure.step
        peak: dict[str, Any] = {} if failure.peak_bytes is None else {"peak_bytes": failure.peak_bytes}
        return job_error(code, failure.message, step, **peak)
    if ending.status == MEMORY_EXIT:
        return job_error(MEMORY_CODE, "The trainer reached its memory cap.", ending.step)
    last_line = f" The last line of its log: {ending.log[-1][:200]}" if ending.log else ""
    hint = KILLED_HINT if ending.status == -signal.SIGKILL else None
    return job_error("trainer_crashed", f"{_cause(ending)}{last_line}", ending.step, hint)


def _was_stopped(ending: Ending) -> bool:
    """Whether it ended because it was told to, by the supervisor or (a signal to all of a service) by others."""
    if ending.done is not None and ending.done.reason == "stopped":
        return True
    told = (None, -signal.SIGTERM, -signal.SIGKILL)  # None: before there was a process
    return ending.stopped is not None and ending.failure is None and ending.status in told


def _rest(session: Session, job: ClaimedJob, desired: Desired, ending: Ending) -> Job:
    if desired is Desired.CANCEL:
        return runs.finish(session, job.id, job.attempt, JobStatus.CANCELLED)
    if desired is Desired.PAUSE:
        return runs.finish(session, job.id, job.attempt, JobStatus.PAUSED)
    # Not the job's fault, so not one of its failures, whether it got as far as a checkpoint or not.
    return runs.release(session, job.id, job.attempt, ending.stopped or "stopped", progressed=True)


def _over_the_cap(session: Session, job: ClaimedJob, error: dict[str, Any]) -> Job:
    plan = _smaller_plan(session, job) if job.memory_replans < MAX_MEMORY_REPLANS else None
    if plan is None:
        tried = (
            f"{job.memory_replans} smaller plans did not fit either" if job.memory_replans else "no smaller plan fits"
        )
        hint = f"{HINTS[MEMORY_CODE]}: {tried}"
        return runs.finish(session, job.id, job.attempt, JobStatus.FAILED, error={**error, "hint": hint})
    return runs.release(session, job.id, job.attempt, MEMORY_CODE, progressed=True, plan=plan.to_json(), error=error)


def _smaller_plan(session: Session, job: ClaimedJob) -> Plan | None:
    """A plan that holds at most half as many positions at once, or None where there is none under the cap."""
    max_positions = int(job.plan["chunk_length"]) * int(job.plan["micro_batch_size"]) // 2
    if max_positions < 1:
        return None
    stored = calibrations.for_job(session, job.model_config, job.train)
    workload = Workload(ModelConfig.from_json(job.model_config), TrainConfig.from_json(job.train))
    try:
        calibration = default_calibration() if stored is None else Calibration.from_json(stored)
    except ValueError:  # a calibration of another version, which the next worker start replaces
        return None
    with contextlib.suppress(MemoryCapInfeasibleError):
        return plan_with_lessons(workload, job.memory_cap_bytes, calibration, max_positions=max_positions)
    return None


def _cause(ending: Ending) -> str:
    name = _signal_name(ending.status)
    if name is not None:
        return f"The trainer was killed by {name}."
    if ending.done is not None:
        return f"The trainer was done at step {ending.done.step} without a checkpoint of it."
    return f"The trainer ended with status {ending.status} and without a message."


def _signal_name(status: int | None) -> str | None:
    if status is None or status >= 0:
        return None
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-status}"
