"""What the workers measured of their devices, and what jobs taught about models on them."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any, cast

from sqlalchemy import ColumnElement, Table, bindparam, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.jsonable import clean_json
from service.models import CalibrationRecord, Job, Metric, ShapeCalibration

LEAST_STEPS = 3
"""Of an attempt that teaches something, the first one not counted."""
LARGEST_FACTOR = 10.0
"""What is farther off, either way, is no property of the model: a machine asleep, a clock set."""
LEAST_WEIGHT = 0.2
"""Of the newest job: machines change."""
LEAST_EXCESS_BYTES = 4 << 20
"""What is worth counting with."""
LARGEST_EXCESS = 0.5
"""Of a plan's peak. What is beyond is no property of the model: a broken build, a child that took the memory."""
EXCESS_DECAY = 0.1
"""What a finished job takes off."""
_STORE_LOCK = 7_203_001
"""Advisory: two workers that report at once have two versions."""


_RECORDS, _LESSONS = cast("Table", CalibrationRecord.__table__), cast("Table", ShapeCalibration.__table__)
_NEWEST_FIRST = (CalibrationRecord.created_at.desc(), CalibrationRecord.version.desc())
_NEWEST = select(_RECORDS.c.data, _RECORDS.c.version).order_by(*_NEWEST_FIRST).limit(1).subquery()
_FOR_SHAPE = select(_NEWEST, _LESSONS.c.jobs, _LESSONS.c.time_factor, _LESSONS.c.peak_excess_bytes).outerjoin(
    _LESSONS,
    (_LESSONS.c.device == _NEWEST.c.data["device"].astext) & (_LESSONS.c.shape == bindparam("shape")),
)


def store(session: Session, device: str, worker: str, data: dict[str, Any]) -> int:
    """Keep `data` (slim_core's Calibration as JSON) as the device's newest calibration; returns its version.

    Those before it stay: a plan names the version that it was made with.
    """
    session.execute(select(func.pg_advisory_xact_lock(_STORE_LOCK)))
    newest = select(func.coalesce(func.max(CalibrationRecord.version), 0)).where(CalibrationRecord.device == device)
    record = CalibrationRecord(
        device=device, version=session.scalars(newest).one() + 1, data=clean_json(data), worker=worker
    )
    session.add(record)
    session.flush()
    return record.version


def measured_at(session: Session) -> datetime | None:
    """When the current calibration was kept; None if there is none yet."""
    newest = _newest(session)
    return None if newest is None else newest.created_at


def of_machine(session: Session, machine: str, younger_than_seconds: float) -> dict[str, Any] | None:
    """The current calibration as JSON, where it is of this `machine` (slim_core's Calibration) and so young."""
    newest = _newest(session)
    if newest is None or newest.data.get("machine") != machine:
        return None
    age = session.scalar(select(func.extract("epoch", func.clock_timestamp() - newest.created_at)))
    return newest.data if age is not None and age < younger_than_seconds else None


def current(session: Session) -> dict[str, Any] | None:
    """The calibration that was stored last as JSON, whatever its device; None if no worker has reported."""
    newest = _newest(session)
    return None if newest is None else newest.data


def for_job(session: Session, model_config: dict[str, Any], train: dict[str, Any]) -> dict[str, Any] | None:
    """The current calibration with its version, and with what jobs of this shape taught."""
    # Asked for each plan, and so past the ORM; both tables are every tenant's.
    found = session.connection().execute(_FOR_SHAPE, {"shape": shape_of(model_config, train)}).one_or_none()
    if found is None:
        return None
    data = {**found.data, "version": found.version}
    if found.jobs is None:
        return data
    data["peak_excess_bytes"] = found.peak_excess_bytes
    if not found.jobs:
        return data
    plural = "" if found.jobs == 1 else "s"
    source = f"{data.get('source')}; times learned from {found.jobs} finished job{plural} of this model"
    return {**data, "source": source, "time_factor": found.time_factor}


def learn(session: Session, job: Job) -> None:
    """Take the times of a job's last attempt, which followed its plan, as those of its shape of model."""
    predicted = job.plan.get("predicted_step_seconds")
    device = _device_of(session, job)
    if device is None or not predicted:
        return
    mine = (*_steps_of_attempt(job), Metric.step_seconds.is_not(None))
    first = select(func.min(Metric.step)).where(*mine).scalar_subquery()
    median = func.percentile_cont(0.5).within_group(Metric.step_seconds)
    count, seconds = session.execute(select(func.count(), median).where(*mine, Metric.step > first)).one()
    if count < LEAST_STEPS or not 1 / LARGEST_FACTOR <= seconds / predicted <= LARGEST_FACTOR:
        return
    known = _lesson(session, device, job)
    planned_with = job.plan.get("time_factor", 1.0)
    factor = seconds / predicted * planned_with
    weight = max(LEAST_WEIGHT, 1 / (known.jobs + 1))
    known.time_factor = known.time_factor ** (1 - weight) * factor**weight
    known.jobs += 1
    known.updated_at = func.now()


def learn_peak(session: Session, job: Job, *, finished: bool, over_cap_bytes: int | None = None) -> None:
    """Take what a job's last attempt held beyond its plan as what the next plans of its shape must count with.

    A peak below the plan says nothing of what was needed: a trainer keeps idle memory up to its plan. So what was
    learned shrinks a little with every job that has `finished` within its plan.

    Args:
        over_cap_bytes: what an attempt that its cap has ended held.
    """
    device = _device_of(session, job)
    planned = job.plan.get("predicted_peak_bytes")
    if device is None or not planned:
        return
    peak = session.scalar(select(func.max(Metric.peak_bytes)).where(*_steps_of_attempt(job))) or 0
    if over_cap_bytes is not None:  # and would have held more
        peak = max(peak, over_cap_bytes, job.memory_cap_bytes + LEAST_EXCESS_BYTES)
    if peak > planned + LEAST_EXCESS_BYTES or (peak > planned and over_cap_bytes is not None):
        counted = (job.plan.get("breakdown") or {}).get("learned", 0)
        if (excess := peak - (planned - counted)) > LARGEST_EXCESS * planned:
            return
        known = _lesson(session, device, job)
        known.peak_excess_bytes = max(known.peak_excess_bytes, excess)
        known.updated_at = func.now()
    elif finished and peak <= planned:
        known = _lesson(session, device, job)
        kept = int(known.peak_excess_bytes * (1 - EXCESS_DECAY))
        known.peak_excess_bytes = kept if kept >= LEAST_EXCESS_BYTES else 0


def _newest(session: Session) -> CalibrationRecord | None:
    return session.scalars(select(CalibrationRecord).order_by(*_NEWEST_FIRST).limit(1)).one_or_none()


def _device_of(session: Session, job: Job) -> str | None:
    """The device that the current calibration is of, if the job was planned with that: what another one predicted
    teaches nothing about this one."""
    data = current(session)
    if data is None or not str(job.plan.get("calibration_source")).startswith(str(data.get("source"))):
        return None
    return str(data.get("device"))


def _steps_of_attempt(job: Job) -> tuple[ColumnElement[bool], ...]:
    return Metric.job_id == job.id, Metric.attempt == job.attempt


def _lesson(session: Session, device: str, job: Job) -> ShapeCalibration:
    """The row of the job's shape, made if it is not there, and locked."""
    key = {"device": device, "shape": shape_of(job.model_config, job.train)}
    session.execute(insert(ShapeCalibration).values(**key, time_factor=1.0, jobs=0).on_conflict_do_nothing())
    return session.get_one(ShapeCalibration, tuple(key.values()), with_for_update=True, populate_existing=True)


def shape_of(model_config: dict[str, Any], train: dict[str, Any]) -> str:
    """Of a model and the way it is trained: what the time of a step depends on beside the plan."""
    optimizer = train.get("optimizer") or {}
    way = [train.get("precision"), train.get("lora"), optimizer.get("name"), bool(train.get("dropout"))]
    text = json.dumps([model_config, way], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
