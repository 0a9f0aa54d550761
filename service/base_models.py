"""Models to start jobs from: uploads, and what finished jobs left behind. Built-ins are code (slim_core)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session

from service.errors import ModelInUseError, ModelNotReadyError, NotFoundError
from service.ids import is_id
from service.models import Job, Model, Tokenization
from service.pages import newest_first
from service.status import READY, TERMINAL, UNFINISHED

GGUF_FILE = "model.gguf"
"""What an uploaded .gguf is called in its model's folder."""


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """What a folder of files was found to be (slim_core.weights.check_model)."""

    config: dict[str, Any]
    """ModelConfig as JSON."""
    layout: str
    """Whose names the tensors have."""
    tokenizer_key: str | None
    """Of the tokenizer beside the weights; None where there is none."""


def describe(row: Model, checked: CheckedModel) -> None:
    """Note in the row what its folder was found to be."""
    row.config = checked.config
    row.layout = checked.layout
    row.tokenizer_key = checked.tokenizer_key
    row.tokenizer_path = row.path if checked.tokenizer_key is not None else None


def get(session: Session, model_id: str, keep: bool = False) -> Model:
    """The model; with `keep`, locked against deletion until the transaction ends. Raises NotFoundError."""
    query = select(Model).where(Model.id == model_id)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    model = session.scalars(query).one_or_none() if is_id("model", model_id) else None
    if model is None:
        raise NotFoundError("model", model_id)
    return model


def ready(session: Session, model_id: str, keep: bool = False) -> Model:
    """A model that a job can start from now. Raises NotFoundError, ModelNotReadyError."""
    model = get(session, model_id, keep)
    if model.status != READY:
        raise ModelNotReadyError(model.id, model.status, model.error)
    return model


def page(session: Session, after: str | None = None, limit: int = 20) -> tuple[list[Model], bool]:
    """Up to `limit` models older than the model `after`, newest first, and whether there are more."""
    return newest_first(session, select(Model), Model.id, after, limit)


def check_unused(session: Session, model: Model) -> None:
    """Raises ModelInUseError while an unfinished job starts from it, or an unfinished job or preparation needs its
    tokenizer. What it says holds as long as the model's row is locked."""
    jobs = list(session.scalars(users(model.id, model.path).order_by(Job.id).limit(20)))
    preparing = list(session.scalars(preparations(model.path).order_by(Tokenization.dataset_id).limit(20)))
    if jobs or preparing:
        raise ModelInUseError(model.id, jobs, preparing)


def users(model_id: Any, path: Any, job: type[Job] = Job) -> Select[str]:
    """Unfinished jobs that start from a model, or read its tokenizer; `job` may be an alias of the table."""
    uses = or_(job.base_model_id == model_id, job.tokenizer_path == path)
    return select(job.id).where(uses, job.status.not_in([status.value for status in TERMINAL]))


def preparations(path: Any) -> Select[str]:
    """Datasets whose tokens are being made by the tokenizer of a model."""
    return select(Tokenization.dataset_id).where(
        Tokenization.tokenizer_path == path, Tokenization.status.in_(UNFINISHED)
    )
