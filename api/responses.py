"""What answers say. Sizes are bytes, times RFC 3339 in UTC, durations seconds, losses nats per token."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Row

from api.schemas import (
    ChunkingChoice,
    EarlyStoppingFields,
    FullFields,
    MatchingFields,
    MethodChoice,
    OptimizerChoice,
    ScheduleFields,
)
from service import models as rows
from service.status import TERMINAL, UNFINISHED, JobStatus
from slim_core.config import ModelConfig

Item = TypeVar("Item", bound=BaseModel)


class _Response(BaseModel):
    model_config = ConfigDict(from_attributes=True, protected_namespaces=())


class Page(_Response, Generic[Item]):
    """A part of a list. Ask with `after` = the last entry's id for the next one."""

    data: list[Item]
    has_more: bool


class PreparationError(_Response):
    """Why something could not be prepared, or is still to be tried again."""

    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    hint: str


class TokenizationResponse(_Response):
    """A dataset under one tokenizer. Counts are null until it is ready."""

    tokenizer: str = Field(description="`bytes`, or the id of a tokenizer or model.")
    status: Literal["pending", "running", "ready", "failed"]
    vocab_size: int | None
    documents: int | None = Field(description="Without those that are left out.")
    tokens: int | None = Field(description="One that ends each document included.")
    targets: int | None = Field(description="Tokens that have a loss.")
    longest_document_tokens: int | None
    histogram: dict[str, int] | None = Field(
        description="Documents by length: `64` counts those of 33 to 64 tokens, and so on by powers of two."
    )
    empty_documents: int | None = Field(description="Left out because they hold no text.")
    untrained_documents: int | None = Field(description="Left out because no part of them has a loss.")
    inexact_cuts: int | None = Field(
        description="Places where a very long text was cut for the tokenizer, which may have changed a token."
    )
    problems: list[dict[str, Any]] = Field(description="The first 20 of a dataset that is broken: `line`, `reason`.")
    error: PreparationError | None = Field(
        description="Of one that failed, or of the last try of one that is tried again, as on a full disk."
    )
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of_row(cls, row: rows.Tokenization) -> Self:
        counts = row.counts or {}
        names = ("vocab_size", "documents", "tokens", "targets", "histogram")
        left_out = ("empty_documents", "untrained_documents", "inexact_cuts")
        error = dict(row.error or {})
        return cls.model_validate(
            {
                **{name: counts.get(name) for name in names + left_out},
                "longest_document_tokens": counts.get("longest"),
                "tokenizer": row.tokenizer,
                "status": row.status,
                "problems": error.pop("problems", []),
                "error": error or None,
                "created_at": row.created_at,
                "finished_at": row.finished_at,
            }
        )


class DatasetResponse(_Response):
    id: str
    name: str
    filename: str
    format: Literal["txt", "jsonl", "parquet"]
    compression: Literal["gzip", "zstd"] | None
    kind: Literal["text", "prompt_completion", "messages"] | None = Field(
        description="Of its documents; null until a .parquet has been read."
    )
    bytes: int = Field(description="Of the file.")
    documents: int | None
    tokens: int | None = Field(
        description="Of a dataset of texts: bytes of UTF-8 and one border a document. Others: see `tokenizations`."
    )
    longest_document_tokens: int | None
    sha256: str = Field(description="Of the file, in hex.")
    problems: list[dict[str, Any]]
    tokenizations: list[TokenizationResponse]
    created_at: datetime

    @classmethod
    def of_row(cls, row: rows.Dataset) -> Self:
        own = {name: getattr(row, name) for name in cls.model_fields if name != "tokenizations"}
        return cls.model_validate({**own, "tokenizations": [TokenizationResponse.of_row(t) for t in row.tokenizations]})


class TokenizerResponse(_Response):
    id: str
    name: str
    source: Literal["upload", "trained"]
    status: Literal["preparing", "ready", "failed"]
    vocab_size: int | None = Field(description="Null until it is ready.")
    dataset: str | None = Field(description="What it is trained on.")
    error: PreparationError | None
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of_row(cls, row: rows.Tokenizer) -> Self:
        return cls.model_validate(
            {
                "id": row.id,
                "name": row.name,
                "source": row.source,
                "status": row.status if row.status in ("ready", "failed") else "preparing",
                "vocab_size": row.vocab_size,
                "dataset": row.dataset_id,
                "error": row.error,
                "created_at": row.created_at,
                "finished_at": row.finished_at,
            }
        )


class FileRecord(_Response):
    name: str
    bytes: int
    sha256: str = Field(description="In hex.")


class ModelResponse(_Response):
    id: str
    name: str
    kind: Literal["built_in", "output", "upload"]
    status: Literal["preparing", "ready", "failed"] = Field(
        description="`preparing`: a .gguf that is being converted; jobs can start when it is `ready`."
    )
    error: dict[str, Any] | None = Field(None, description="Why it failed, or waits to be tried again.")
    config: dict[str, Any] | None = Field(description="Null until a .gguf is converted.")
    num_parameters: int | None
    layout: Literal["slimtune", "llama", "gpt2"] | None = Field(
        description="Whose names the tensors have: ours, or those of transformers."
    )
    tokenizer: str | None = Field(description="`own`: a tokenizer.json comes with it; `bytes`: it reads bytes.")
    bytes: int | None = Field(None, description="Of an upload's files; of a converted .gguf, of what it became.")
    files: list[FileRecord] | None = Field(None, description="Of an upload, as they came.")
    job: str | None = Field(None, description="The job whose output it is.")
    step: int | None = None
    created_at: datetime | None = None

    @classmethod
    def of_builtin(cls, name: str, config: ModelConfig) -> Self:
        parameters = config.num_parameters
        return cls(
            id=name,
            name=name,
            kind="built_in",
            status="ready",
            config=config.to_json(),
            num_parameters=parameters,
            layout="slimtune",
            tokenizer=None,
        )

    @classmethod
    def of_row(cls, row: rows.Model) -> Self:
        parameters = None if row.config is None else ModelConfig.from_json(row.config).num_parameters
        own = {
            "status": "preparing" if row.status in UNFINISHED else row.status,
            "num_parameters": parameters,
            "tokenizer": "own" if row.tokenizer_key is not None else "bytes" if row.config is not None else None,
            "job": row.job_id,
        }
        same = ("id", "name", "kind", "error", "config", "layout", "bytes", "files", "step", "created_at")
        return cls.model_validate({name: getattr(row, name) for name in same} | own)


class BreakdownResponse(_Response):
    """Bytes at the peak by cause; they add up to the predicted peak."""

    runtime: int
    parameters: int
    gradients: int
    optimizer: int
    states: int
    activations: int
    logits: int
    workspace: int
    safety: int
    learned: int = Field(0, description="What earlier jobs of this model held beyond their plans.")


class FrontierResponse(_Response):
    chunk_length: int
    state_policy: str
    micro_batch_size: int
    predicted_peak_bytes: int
    predicted_step_seconds: float


class PlanSummary(_Response):
    chunk_length: int
    num_chunks: int
    state_policy: str
    micro_batch_size: int
    accumulation_steps: int
    predicted_peak_bytes: int
    breakdown: BreakdownResponse
    predicted_step_seconds: float
    predicted_total_seconds: float
    unchunked_peak_bytes: int = Field(description="Predicted peak of the ordinary step, whole batch and sequence.")
    minimum_cap_bytes: int = Field(description="The smallest cap for which there is a plan.")
    max_sequence_length: int = Field(description="The longest sequence that this cap can train, other things equal.")
    reason: str
    calibration_source: str
    calibration_version: int = Field(0, description="Of the stored calibration of the device; 0 for the default.")
    time_factor: float = Field(description="What finished jobs of this model taught about times, in the prediction.")


class PlanResponse(PlanSummary):
    frontier: list[FrontierResponse] = Field(description="Plans that no other beats in both memory and time.")


class PlanAnswer(PlanResponse):
    """A plan for a request that was not stored."""

    memory_cap_bytes: int
    total_steps: int


class GradientCheckResponse(_Response):
    """The gradient of one real sequence under the plan, compared with that of another chunk length."""

    chunk_length: int
    compared_with: int = Field(description="The other chunk length; `sequence_length` is the ordinary step.")
    relative_error: float = Field(description="Norm of the difference over the norm of the gradient.")


class CertificateResponse(_Response):
    """What a finished job can show of its promises."""

    memory_cap_bytes: int
    predicted_peak_bytes: int
    probed_peak_bytes: int | None = Field(description="Of the first micro-batch, before anything was trained.")
    measured_peak_bytes: int | None
    cap_held: bool
    num_chunks: int
    gradient_check: GradientCheckResponse | None = Field(description="Null where it could not be done.")


class ProgressResponse(_Response):
    step: int
    total_steps: int
    tokens: int
    loss: float | None
    step_seconds: float | None = Field(description="Of the last step.")
    eta_seconds: float | None = Field(
        description="Until the end, from now: the steps that are left, as the plan predicts them, later by the median "
        "of the latest ones. Null for a finished job."
    )


class JobError(_Response):
    model_config = ConfigDict(extra="allow")

    code: str
    message: str
    step: int | None = None
    hint: str | None = None


class JobSummary(_Response):
    """A job as lists have it: its plan without the frontier."""

    id: str
    name: str | None
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    desired: Literal["run", "pause", "cancel"] = Field(description="What was last asked of the job.")
    model: str
    attention: Literal["softmax", "performer"] | None = None
    dataset: str
    validation_dataset: str | None
    memory_cap: int = Field(description="Bytes.")
    sequence_length: int
    batch_size: int
    steps: int | None
    epochs: int | None
    optimizer: OptimizerChoice
    schedule: ScheduleFields
    method: MethodChoice = Field(default_factory=FullFields)
    matching: MatchingFields | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    dropout: float = 0.0
    label_smoothing: float = 0.0
    gradient_clip: float | None
    evaluate_every: int | None
    evaluate_sequences: int
    validation_fraction: float | None = None
    packing: Literal["packed", "continuous", "single"] = "continuous"
    tokenizer: str | None = None
    checkpoint_every: int | None
    keep: int
    early_stopping: EarlyStoppingFields | None
    chunking: ChunkingChoice
    seed: int
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    plan: PlanSummary
    predicted_peak_bytes: int
    probed_peak_bytes: int | None
    measured_peak_bytes: int | None
    progress: ProgressResponse
    certificate: CertificateResponse | None = Field(description="Of a job that has succeeded.")
    output_model: str | None
    error: JobError | None

    @classmethod
    def of_row(cls, job: rows.Job | Row[Any]) -> Self:
        added = {
            "id": job.id,
            "status": job.status,
            "desired": job.desired,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "attempt": job.attempt,
            "plan": job.plan,
            "predicted_peak_bytes": job.predicted_peak_bytes,
            "probed_peak_bytes": job.probed_peak_bytes,
            "measured_peak_bytes": job.measured_peak_bytes,
            "certificate": _certificate(job),
            "progress": _progress(job),
            "output_model": job.output_model_id,
            "error": job.error,
        }
        return cls.model_validate({**job.spec, **added})


class JobResponse(JobSummary):
    plan: PlanResponse


def _certificate(job: rows.Job | Row[Any]) -> dict[str, Any] | None:
    if job.status != JobStatus.SUCCEEDED:
        return None
    return {
        "memory_cap_bytes": job.memory_cap_bytes,
        "predicted_peak_bytes": job.predicted_peak_bytes,
        "probed_peak_bytes": job.probed_peak_bytes,
        "measured_peak_bytes": job.measured_peak_bytes,
        "cap_held": job.measured_peak_bytes is not None and job.measured_peak_bytes <= job.memory_cap_bytes,
        "num_chunks": job.plan["num_chunks"],
        "gradient_check": job.gradient_check,
    }


def _progress(job: rows.Job | Row[Any]) -> dict[str, Any]:
    typical = job.plan["predicted_step_seconds"] if job.typical_step_seconds is None else job.typical_step_seconds
    ended = JobStatus(job.status) in TERMINAL
    return {
        "step": job.step,
        "total_steps": job.total_steps,
        "tokens": job.tokens,
        "loss": job.loss,
        "step_seconds": job.step_seconds,
        "eta_seconds": None if ended else max(job.total_steps - job.step, 0) * typical,
    }


class EventResponse(_Response):
    id: int
    attempt: int
    type: str
    created_at: datetime
    data: dict[str, Any]


class MetricResponse(_Response):
    step: int
    attempt: int
    loss: float | None = Field(description="Null where it was not finite.")
    learning_rate: float | None
    grad_norm: float | None
    step_seconds: float | None
    tokens: int | None = Field(description="Trained on since the start of the job.")
    peak_bytes: int | None
    validation_loss: float | None


class ArtifactResponse(_Response):
    name: str
    media_type: str
    steps: int = Field(description="It ends at this step.")
    complete: bool = Field(description="Whether the job is over, so that there will never be more.")


class CheckpointMetrics(_Response):
    validation_loss: float | None


class CheckpointResponse(_Response):
    step: int
    attempt: int
    created_at: datetime
    is_best: bool = Field(description="Whether it has the lowest validation loss so far.")
    metrics: CheckpointMetrics
    files: list[FileRecord]

    @classmethod
    def of_row(cls, row: rows.Checkpoint) -> Self:
        return cls.model_validate(
            {
                "step": row.step,
                "attempt": row.attempt,
                "created_at": row.created_at,
                "is_best": row.is_best,
                "metrics": {"validation_loss": row.validation_loss},
                "files": row.files,
            }
        )


class DeviceResponse(_Response):
    id: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int = Field(description="What the caps of the jobs on it may add up to.")
    bytes_in_use: int = Field(description="The sum of the caps of the jobs that run there.")
    slots: int = Field(description="Jobs at once, at most.")
    jobs_running: int
    worker: str = Field(description="Who announced it.")
    live: bool = Field(description="Whether it was announced in the last three minutes, as workers do each minute.")
    updated_at: datetime


class HealthResponse(_Response):
    status: Literal["ok", "unavailable"]


class ReadinessResponse(HealthResponse):
    checks: dict[Literal["database", "schema", "broker", "worker", "storage"], bool] = Field(
        description="`schema`: whether the database was migrated far enough for this version. `worker`: whether one "
        "has ever reported its calibration. `storage`: whether the object store answers; absent where files lie in a "
        "folder."
    )


class SchemaResponse(_Response):
    expected: str = Field(description="The revision that this version was written for.")
    found: str | None = Field(description="The database's; null where it cannot be reached, or was never migrated.")


class VersionResponse(_Response):
    version: str
    revision: str | None = Field(description="Of the source, if it was told to the build.")
    api: str = Field(
        description="Of the contract of this API: the second number grows with what is added, the first "
        "with what breaks clients."
    )
    database_schema: SchemaResponse = Field(alias="schema")
