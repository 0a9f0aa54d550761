"""What the workers measured of their devices, and what finished jobs taught about models on them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import func, select
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


def store(session: Session, device: str, worker: str, data: dict[str, Any]) -> int:
    """Keep `data` (slim_core's Calibration as JSON) as the device's newest calibration; returns its version."""
    values = {"data": clean_json(data), "worker": worker, "updated_at": func.now()}
    statement = (
        insert(CalibrationRecord)
        .values(device=device, **values)
        .on_conflict_do_update(
            index_elements=[CalibrationRecord.device], set_={**values, "version": CalibrationRecord.version + 1}
        )
        .returning(CalibrationRecord.version)
    )
    return session.execute(statement).scalar_one()


def current(session: Session) -> dict[str, Any] | None:
    """The calibration that was stored last as JSON, whatever its device; None if no worker has reported."""
    return session.scalar(select(CalibrationRecord.data).order_by(CalibrationRecord.updated_at.desc()).limit(1))


def for_job(session: Session, model_config: dict[str, Any], train: dict[str, Any]) -> dict[str, Any] | None:
    """The current calibration with what finished jobs of this shape taught."""
    data = current(session)
    if data is None:
        return None
    learned = session.get(ShapeCalibration, (str(data.get("device")), shape_of(model_config, train)))
    if learned is None:
        return data
    plural = "" if learned.jobs == 1 else "s"
    source = f"{data.get('source')}; times learned from {learned.jobs} finished job{plural} of this model"
    return {**data, "source": source, "time_factor": learned.time_factor}


def learn(session: Session, job: Job) -> None:
    """Take the times of a job's last attempt, which followed its plan, as those of its shape of model."""
    data = current(session)
    predicted = job.plan.get("predicted_step_seconds")
    if data is None or not predicted:
        return
    if not str(job.plan.get("calibration_source")).startswith(str(data.get("source"))):
        return  # a factor of what another calibration predicted would mislead under this one
    mine = (Metric.job_id == job.id, Metric.attempt == job.attempt, Metric.step_seconds.is_not(None))
    first = select(func.min(Metric.step)).where(*mine).scalar_subquery()
    median = func.percentile_cont(0.5).within_group(Metric.step_seconds)
    count, seconds = session.execute(select(func.count(), median).where(*mine, Metric.step > first)).one()
    if count < LEAST_STEPS or not 1 / LARGEST_FACTOR <= seconds / predicted <= LARGEST_FACTOR:
        return
    key = (str(data.get("device")), shape_of(job.model_config, job.train))
    known = session.get(ShapeCalibration, key, with_for_update=True)
    planned_with = job.plan.get("time_factor", 1.0)
    factor = seconds / predicted * planned_with
    if known is None:
        values = {"device": key[0], "shape": key[1], "time_factor": factor, "jobs": 1}
        session.execute(insert(ShapeCalibration).values(values).on_conflict_do_nothing())
        return
    weight = max(LEAST_WEIGHT, 1 / (known.jobs + 1))
    known.time_factor = known.time_factor ** (1 - weight) * factor**weight
    known.jobs += 1
    known.updated_at = func.now()


def shape_of(model_config: dict[str, Any], train: dict[str, Any]) -> str:
    """Of a model and the way it is trained: what the time of a step depends on beside the plan."""
    optimizer = train.get("optimizer") or {}
    way = [train.get("precision"), train.get("lora"), optimizer.get("name"), bool(train.get("dropout"))]
    text = json.dumps([model_config, way], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
