"""Models that finished jobs left behind, to download or to start other jobs from. Built-ins are code (slim_core)."""

from __future__ import annotations

from sqlalchemy import delete as sql_delete
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.errors import ModelInUseError, NotFoundError
from service.ids import is_id
from service.models import Checkpoint, Job, Model
from service.pages import newest_first
from service.status import TERMINAL


def get(session: Session, model_id: str, keep: bool = False) -> Model:
    """The model; with `keep`, locked against deletion until the transaction ends. Raises NotFoundError."""
    query = select(Model).where(Model.id == model_id)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    model = session.scalars(query).one_or_none() if is_id("model", model_id) else None
    if model is None:
        raise NotFoundError("model", model_id)
    return model


def page(session: Session, after: str | None = None, limit: int = 20) -> tuple[list[Model], bool]:
    """Up to `limit` models older than the model `after`, newest first, and whether there are more."""
    return newest_first(session, select(Model), Model.id, after, limit)


def delete(session: Session, model_id: str) -> str:
    """Delete the model and the checkpoint that it is; returns the folder to remove after the commit.

    Raises NotFoundError, and ModelInUseError while an unfinished job starts from it.
    """
    query = select(Model).where(Model.id == model_id).with_for_update()
    model = session.scalars(query).one_or_none() if is_id("model", model_id) else None
    if model is None:
        raise NotFoundError("model", model_id)
    users = select(Job.id).where(
        Job.base_model_id == model_id, Job.status.not_in([status.value for status in TERMINAL])
    )
    if jobs := list(session.scalars(users.order_by(Job.id).limit(20))):
        raise ModelInUseError(model_id, jobs)
    session.execute(update(Job).where(Job.output_model_id == model_id).values(output_model_id=None))
    session.execute(sql_delete(Checkpoint).where(Checkpoint.job_id == model.job_id, Checkpoint.step == model.step))
    session.execute(sql_delete(Model).where(Model.id == model_id))
    return model.path
