"""What the workers measured of their devices."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service.jsonable import clean_json
from service.models import CalibrationRecord


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
