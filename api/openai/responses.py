"""Answers in OpenAI's shapes. Times are whole seconds since 1970; fields that OpenAI has no word for come along."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from api.openai.messages import level_of, message_of
from api.responses import JobSummary, PlanSummary, ProgressResponse
from api.schemas import AdamWFields, MethodChoice
from service import models as rows
from service import result_files
from service.result_files import ResultFile
from service.status import FAILED, READY, TERMINAL, JobStatus

DEFAULT_LEARNING_RATE: float = AdamWFields.model_fields["learning_rate"].default
"""What a learning rate multiplier of 1 means."""


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


Item = TypeVar("Item", bound=BaseModel)


class ListOf(_Answer, Generic[Item]):
    """A part of a list. Ask with `after` = `last_id` for the next one, as the client does by itself."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None


def list_of(items: list[Item], has_more: bool) -> ListOf[Item]:
    ids = [str(getattr(item, "id", "")) for item in items]
    return ListOf(data=items, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)


class Deleted(_Answer):
    id: str
    object: Literal["file", "model"]
    deleted: Literal[True] = True


class FileObject(_Answer):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["uploaded", "processed", "error"] = Field(
        description="`uploaded` while the tokens are being made, which a job need not wait for."
    )
    status_details: str | None = None

    @classmethod
    def of_dataset(cls, row: rows.Dataset) -> Self:
        made = next((item for item in row.tokenizations if item.key == "bytes"), None)
        failed = made is not None and made.status == FAILED
        error = made.error if made is not None and failed else None
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=_seconds(row.created_at),
            expires_at=None if row.expires_at is None else _seconds(row.expires_at),
            filename=row.filename,
            purpose="fine-tune",
            status="error" if failed else "processed" if made is None or made.status == READY else "uploaded",
            status_details=None if error is None else error["message"],
        )

    @classmethod
    def of_result(cls, file: ResultFile) -> Self:
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=_seconds(file.created_at),
            filename=file.filename,
            purpose="fine-tune-results",
            status="processed",
        )


class UploadObject(_Answer):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = Field(None, description="Of a completed upload, unless it was deleted since.")

    @classmethod
    def of_row(cls, row: rows.PartUpload, state: str, dataset: rows.Dataset | None = None) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "bytes": row.bytes,
                "created_at": _seconds(row.created_at),
                "expires_at": _seconds(row.expires_at),
                "filename": row.filename,
                "status": state,
                "file": None if dataset is None else FileObject.of_dataset(dataset),
            }
        )


class PartObject(_Answer):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of_row(cls, row: rows.UploadPart) -> Self:
        return cls(id=row.id, created_at=_seconds(row.created_at), upload_id=row.upload_id)


class HyperparametersObject(_Answer):
    n_epochs: int | Literal["auto"] = Field(description="`auto` of a job in steps.")
    batch_size: int
    learning_rate_multiplier: float = Field(description="The learning rate over the default one, 1e-3.")


class SupervisedObject(_Answer):
    hyperparameters: HyperparametersObject


class MethodObject(_Answer):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedObject


class ErrorObject(_Answer):
    code: str
    message: str
    param: str | None = None
    hint: str | None = None


class FineTuningJob(_Answer):
    """OpenAI's fields; then those of `GET /jobs/{id}` that it has no word for."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: ErrorObject | None
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None = Field(description="Of a running job, as the latest steps say.")
    hyperparameters: HyperparametersObject
    method: MethodObject
    model: str
    organization_id: str = Field(description="The tenant.")
    result_files: list[str] = Field(
        description="Once the job is over: its metrics as CSV, then the files of the model, weights and all."
    )
    seed: int
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = Field(
        description="`queued` of a paused job as well: see `paused`."
    )
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: list[Any] = Field(description="None, always.")
    metadata: dict[str, str]
    suffix: str | None
    paused: bool
    memory_cap: int = Field(description="Bytes.")
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    plan: PlanSummary
    progress: ProgressResponse
    sequence_length: int
    steps: int | None
    training_method: MethodChoice = Field(description="`full` or `lora`, as in POST /jobs.")

    @classmethod
    def of_row(cls, job: rows.Job, final: rows.Checkpoint | None) -> Self:
        """`final` is the checkpoint of its output (service.result_files.finals)."""
        own = JobSummary.of_row(job)
        over = JobStatus(job.status) in TERMINAL
        eta = own.progress.eta_seconds
        hyperparameters = {
            "n_epochs": "auto" if own.epochs is None else own.epochs,
            "batch_size": own.batch_size,
            "learning_rate_multiplier": own.optimizer.learning_rate / DEFAULT_LEARNING_RATE,
        }
        return cls.model_validate(
            {
                "id": job.id,
                "created_at": _seconds(job.created_at),
                "error": job.error,
                "fine_tuned_model": job.output_model_id,
                "finished_at": None if job.finished_at is None else _seconds(job.finished_at),
                "estimated_finish": int(time.time() + eta) if own.status == "running" and eta is not None else None,
                "hyperparameters": hyperparameters,
                "method": {"supervised": {"hyperparameters": hyperparameters}},
                "organization_id": job.tenant,
                "result_files": result_files.ids_of(job, final),
                "status": "queued" if own.status == "paused" else own.status,
                "trained_tokens": job.tokens if over else None,
                "training_file": own.dataset,
                "validation_file": own.validation_dataset,
                "integrations": [],
                "suffix": own.name,
                "paused": own.status == "paused",
                "plan": own.plan,
                "progress": own.progress,
                "training_method": own.method,
                **{name: getattr(own, name) for name in _SAME},
            }
        )


_SAME = (
    "model",
    "seed",
    "metadata",
    "memory_cap",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "sequence_length",
    "steps",
)
"""Fields of a job whose names and meanings are ours."""

EVENT_PREFIX = "event_"


class JobEventObject(_Answer):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = Field(description="`metrics` of a validation.")
    data: dict[str, Any] = Field(description="As in GET /jobs/{id}/events, with `event` for its type.")

    @classmethod
    def of_row(cls, row: rows.JobEvent) -> Self:
        return cls.model_validate(
            {
                "id": f"{EVENT_PREFIX}{row.id}",
                "created_at": _seconds(row.created_at),
                "level": level_of(row.type),
                "message": message_of(row.type, row.data),
                "type": "metrics" if row.type == "evaluation" else "message",
                "data": {**row.data, "event": row.type, "attempt": row.attempt},
            }
        )


class CheckpointMetricsObject(_Answer):
    step: int
    train_loss: float | None
    valid_loss: float | None


CHECKPOINT_PREFIX = "ckpt_"


class JobCheckpointObject(_Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str = Field(
        description="The model's id where this checkpoint is the job's output; else a name: its `files` are the model."
    )
    step_number: int
    metrics: CheckpointMetricsObject
    files: list[str] = Field(description="Ids of its files, for GET /v1/files/{id}/content.")

    @classmethod
    def of_row(cls, row: rows.Checkpoint, train_loss: float | None, model_id: str | None) -> Self:
        """`model_id` is that of the model which this checkpoint is, if it is one."""
        return cls(
            id=checkpoint_id(row.job_id, row.step),
            created_at=_seconds(row.created_at),
            fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=model_id or f"{row.job_id}:step-{row.step}",
            step_number=row.step,
            metrics=CheckpointMetricsObject(step=row.step, train_loss=train_loss, valid_loss=row.validation_loss),
            files=result_files.ids_of_checkpoint(row),
        )


def checkpoint_id(job_id: str, step: int) -> str:
    return f"{CHECKPOINT_PREFIX}{job_id.removeprefix('job_')}_{step}"


class ModelObject(_Answer):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="0 for a model that is built in.")
    owned_by: str = Field(description="The tenant; `slimtune` for what is built in.")
    name: str
    kind: Literal["built_in", "output", "upload"]
    status: Literal["preparing", "ready", "failed"]

    @classmethod
    def of_builtin(cls, name: str) -> Self:
        return cls(id=name, created=0, owned_by="slimtune", name=name, kind="built_in", status="ready")

    @classmethod
    def of_row(cls, row: rows.Model) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "created": _seconds(row.created_at),
                "owned_by": row.tenant,
                "name": row.name,
                "kind": row.kind,
                "status": row.status if row.status in (READY, FAILED) else "preparing",
            }
        )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
