"""The tables. Migrations under migrations/versions create them; the columns' units are in their names or below."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Identity, Index, Text, func, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from service.status import Desired, JobStatus

# Identifiers sort by creation, byte for byte, whatever the database's locale.
Id = Text(collation="C")


def _one_of(column: str, values: type[JobStatus | Desired]) -> str:
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012  # SQLAlchemy's declared shape
        str: Text(),
        int: BigInteger(),
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        list[dict[str, Any]]: JSONB(none_as_null=True),
        dict[str, str]: JSONB(none_as_null=True),
    }


class Prepared:
    """What the preparer makes in the background (preparations.py): columns of its queue, lease and fence."""

    status: Mapped[str]
    """pending, running, ready or failed."""
    attempt: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    """Attempts that ended without saying why."""
    lease_until: Mapped[datetime | None]
    retry_at: Mapped[datetime | None]
    """Not before."""
    worker: Mapped[str | None]

    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """{code, message, hint, ...} of one that failed, or waits to be tried again."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    finished_at: Mapped[datetime | None]


class Owned:
    """Rows that belong to a tenant (tenancy.py)."""

    tenant: Mapped[str] = mapped_column(Id, server_default="default")


def _prepared_args(table: str) -> tuple[CheckConstraint | Index, ...]:
    return (
        CheckConstraint("status IN ('pending', 'running', 'ready', 'failed')", name=f"{table}_status"),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name=f"{table}_lease_while_running"),
        Index(f"{table}_unfinished", "created_at", postgresql_where=text("status IN ('pending', 'running')")),
    )


class Tokenization(Prepared, Base):
    """The token files of a dataset under one tokenizer."""

    __tablename__ = "tokenizations"
    __table_args__ = _prepared_args("tokenizations")

    dataset_id: Mapped[str] = mapped_column(Id, ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(Id, primary_key=True)
    """`bytes`, or what the tokenizer is by its content: two ids of one tokenizer share their files."""
    tokenizer: Mapped[str]
    """As it was asked for: `bytes`, or the id of a tokenizer or model."""
    tokenizer_path: Mapped[str | None]
    """Folder of its files, relative to the data folder; None for bytes."""
    counts: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """What the token files' meta.json says, once they are there."""


class Tokenizer(Owned, Prepared, Base):
    """A tokenizer.json: uploaded, or trained on a dataset."""

    __tablename__ = "tokenizers"
    __table_args__ = (
        *_prepared_args("tokenizers"),
        CheckConstraint("source IN ('upload', 'trained')", name="tokenizers_source"),
        Index("tokenizers_tenant_id", "tenant", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    source: Mapped[str]
    key: Mapped[str | None]
    """Of its content (Tokenization.key), once it is known."""
    path: Mapped[str]
    """Folder, relative to the data folder."""
    bytes: Mapped[int] = mapped_column(server_default="0")
    """Of its files."""
    vocab_size: Mapped[int | None]
    wanted_vocab_size: Mapped[int | None]
    """Of one that is trained."""
    dataset_id: Mapped[str | None] = mapped_column(Id)
    """What it is trained on. No foreign key: it outlives that."""


class Dataset(Owned, Base):
    """An uploaded file; its counts where they were known when it arrived, under the byte tokenizer (UTF-8 bytes and one
    border per document)."""

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint("format IN ('txt', 'jsonl', 'parquet')", name="datasets_format"),
        CheckConstraint("compression IN ('gzip', 'zstd')", name="datasets_compression"),
        CheckConstraint("kind IN ('text', 'prompt_completion', 'messages')", name="datasets_kind"),
        Index("datasets_tenant_id", "tenant", "id"),
        Index("datasets_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    filename: Mapped[str]
    """The client's name for the file, cleaned; metadata only."""
    format: Mapped[str]
    compression: Mapped[str | None]
    kind: Mapped[str | None]
    """Of its documents; None until the preparer has read a .parquet."""
    bytes: Mapped[int]
    documents: Mapped[int | None]
    tokens: Mapped[int | None]
    longest_document_tokens: Mapped[int | None]
    sha256: Mapped[str]
    problems: Mapped[list[dict[str, Any]]]
    """Remarks that did not prevent the upload: [{line, reason}]."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    """From when on it is deleted, once no job reads it."""
    tokenizations: Mapped[list[Tokenization]] = relationship(
        lazy="selectin", order_by=Tokenization.created_at, passive_deletes=True
    )


class PartUpload(Owned, Base):
    """A file that comes in parts (part_uploads.py)."""

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'completed', 'cancelled')", name="uploads_status"),
        CheckConstraint("(status = 'completed') = (completed_at IS NOT NULL)", name="uploads_completed"),
        Index("uploads_tenant_status", "tenant", "status"),
        Index("uploads_expires_at", "expires_at"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    filename: Mapped[str]
    """The client's name for the file, cleaned; metadata only."""
    bytes: Mapped[int]
    """Of the whole file, as announced."""
    status: Mapped[str]
    """One that is pending for longer than until `expires_at` has expired."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    file_expires_seconds: Mapped[int | None]
    """How long after its completion the dataset is to be deleted."""
    claim: Mapped[str | None]
    """Of the request that is putting the parts together, ..."""
    claimed_until: Mapped[datetime | None]
    """... which is held to have died from then on."""
    completed_at: Mapped[datetime | None]
    dataset_id: Mapped[str | None] = mapped_column(Id)
    """What it became. No foreign key: it outlives that."""


class UploadPart(Owned, Base):
    __tablename__ = "upload_parts"
    __table_args__ = (Index("upload_parts_upload_id", "upload_id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    upload_id: Mapped[str] = mapped_column(Id, ForeignKey("uploads.id", ondelete="CASCADE"))
    bytes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Model(Owned, Prepared, Base):
    """A folder of weights to start jobs from: uploaded, or the output of a succeeded job."""

    __tablename__ = "models"
    __table_args__ = (
        *_prepared_args("models"),
        CheckConstraint("kind IN ('output', 'upload')", name="models_kind"),
        CheckConstraint("(kind = 'output') = (job_id IS NOT NULL AND step IS NOT NULL)", name="models_job"),
        CheckConstraint("status <> 'ready' OR config IS NOT NULL AND layout IS NOT NULL", name="models_described"),
        Index("models_tenant_id", "tenant", "id"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    job_id: Mapped[str | None] = mapped_column(Id, ForeignKey("jobs.id"), index=True)
    """Whose output it is, ..."""
    step: Mapped[int | None]
    """... and after which of its steps."""
    config: Mapped[dict[str, Any] | None]
    """None until a .gguf is converted, and so `layout`."""
    layout: Mapped[str | None]
    """Whose names the tensors have (slim_core.weights.layout)."""
    path: Mapped[str]
    """Folder, relative to the data folder."""
    files: Mapped[list[dict[str, Any]] | None]
    """Of an upload, as they came: [{name, bytes, sha256}]."""
    bytes: Mapped[int | None]
    """Of these; of a .gguf, once it is converted, of what it became."""
    tokenizer_key: Mapped[str | None] = mapped_column(Id)
    """Of the tokenizer that comes with it (Tokenization.key); None for bytes."""
    tokenizer_path: Mapped[str | None]


class Job(Owned, Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("status", JobStatus), name="jobs_status"),
        CheckConstraint(_one_of("desired", Desired), name="jobs_desired"),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="jobs_lease_while_running"),
        Index("jobs_status_id", "status", "id"),
        Index("jobs_tenant_id", "tenant", "id"),
        Index("jobs_tenant_status_id", "tenant", "status", "id"),
        Index("jobs_lease", "lease_until", postgresql_where=text("status = 'running'")),
        Index("jobs_queued", "tenant", "id", postgresql_where=text("status = 'queued'")),
        Index("jobs_running", "device_id", postgresql_where=text("status = 'running'")),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None]
    status: Mapped[str]
    desired: Mapped[str]
    spec: Mapped[dict[str, Any]]
    """The validated request, defaults filled in."""
    train: Mapped[dict[str, Any]]
    model_config: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any]]
    memory_cap_bytes: Mapped[int]
    dataset_id: Mapped[str] = mapped_column(Id)
    """No foreign key: a finished job outlives its dataset."""
    validation_dataset_id: Mapped[str | None] = mapped_column(Id)
    base_model_id: Mapped[str | None] = mapped_column(Id)
    """A models.id, or None for a built-in architecture with new weights."""
    model: Mapped[str]
    """The model as the request named it."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    """Attempts in a row that ended without a new checkpoint."""
    memory_replans: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    worker: Mapped[str | None]
    step: Mapped[int] = mapped_column(server_default="0")
    total_steps: Mapped[int]
    tokens: Mapped[int] = mapped_column(server_default="0")
    loss: Mapped[float | None]
    step_seconds: Mapped[float | None]
    """Of the last step."""
    typical_step_seconds: Mapped[float | None]
    """Median of the latest steps under the plan."""
    predicted_peak_bytes: Mapped[int]
    probed_peak_bytes: Mapped[int | None]
    """Of the last attempt's first micro-batch, before it trained anything."""
    measured_peak_bytes: Mapped[int | None]
    gradient_check: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """{chunk_length, compared_with, relative_error}."""
    output_model_id: Mapped[str | None] = mapped_column(Id)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    """{code, message, step, hint} of a job that failed, or was paused because it cannot go on."""
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata", server_default=text("'{}'"))
    device_id: Mapped[str | None] = mapped_column(Id)
    """Where its last attempt runs or ran."""
    charged_bytes: Mapped[int | None]
    """What that attempt counts as in its tenant's account (packing.charged_bytes)."""
    claimed_at: Mapped[datetime | None]
    """When that attempt began."""
    blocked_since: Mapped[datetime | None]
    """When it was its turn for the first time, in this stay in the queue, and it did not fit."""
    tokenizer_key: Mapped[str] = mapped_column(Id, server_default="bytes")
    """Which token files of its datasets it reads (Tokenization.key)."""
    tokenizer_path: Mapped[str | None]
    """Folder of its tokenizer, relative to the data folder; None for bytes."""
    tokenizer_id: Mapped[str | None] = mapped_column(Id)
    """The tokenizer that the request named, if it named one."""


class Device(Base):
    """What jobs run on: one machine's CPU or GPU, as its worker announces it."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    """Kind and machine."""
    kind: Mapped[str]
    memory_bytes: Mapped[int]
    """That the caps of the jobs on it may add up to."""
    slots: Mapped[int]
    """Jobs at once, at most."""
    worker: Mapped[str]
    reserved_for: Mapped[str | None] = mapped_column(Id)
    """The job for which it is kept free."""
    reserved_until: Mapped[datetime | None]
    """When it was expected to have room for that job: what is to end by then may start before it."""
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class TenantUsage(Base):
    """What a tenant's ended runs held of late."""

    __tablename__ = "tenant_usage"

    tenant: Mapped[str] = mapped_column(Id, primary_key=True)
    held_bytes: Mapped[float]
    """Average, weighted by recency, as of `updated_at` (packing.remembered, packing.forgotten)."""
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Base):
    """Who may ask for what (keys.py). The key itself is nowhere; limits that are null do not apply."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant: Mapped[str] = mapped_column(Id)
    name: Mapped[str]
    """For people."""
    sha256: Mapped[str] = mapped_column(Id, unique=True)
    """Of the whole key, in hex."""
    prefix: Mapped[str]
    """The key's first characters, for people to tell keys apart."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """To the minute."""
    requests_per_minute: Mapped[int | None]
    max_jobs: Mapped[int | None]
    """Unfinished ones of the tenant."""
    max_bytes: Mapped[int | None]
    """That the tenant's datasets, tokenizers, models and checkpoints may hold."""


class WebSession(Base):
    """A browser that somebody has logged in with a key (web_sessions.py)."""

    __tablename__ = "web_sessions"

    sha256: Mapped[str] = mapped_column(Id, primary_key=True)
    """Of the token, in hex."""
    key_id: Mapped[str] = mapped_column(Id, ForeignKey("api_keys.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[datetime]


class IdempotencyKey(Owned, Base):
    """What a request was answered under its Idempotency-Key (idempotency.py)."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("idempotency_keys_created_at", "created_at"),)

    tenant: Mapped[str] = mapped_column(Id, primary_key=True)
    key: Mapped[str] = mapped_column(Id, primary_key=True)
    request_sha256: Mapped[str]
    """Of the validated request, less its defaults, as JSON with sorted keys; in hex."""
    job_id: Mapped[str] = mapped_column(Id)
    """No foreign key: a request that comes once more gets its answer, not another job, whatever became of the first."""
    answer: Mapped[str]
    """The body: JSON, as it went out."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class JobEvent(Base):
    __tablename__ = "job_events"
    __table_args__ = (
        Index("job_events_job_id_id", "job_id", "id"),
        Index("job_events_given_back", "type", postgresql_where=text("type IN ('requeued', 'replanned')")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    type: Mapped[str]
    data: Mapped[dict[str, Any]]


class Webhook(Owned, Base):
    """An address that hears of a tenant's jobs (webhooks.py)."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("webhooks_tenant_id", "tenant", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str | None]
    url: Mapped[str]
    events: Mapped[list[str]] = mapped_column(ARRAY(Text()))
    """The types that it wants."""
    secret: Mapped[str]
    """In plain text: it signs."""
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[datetime | None]
    """Until then the one before signs too."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    failing_since: Mapped[datetime | None]
    """Of the first failure after the last success."""
    sent_at: Mapped[datetime | None]
    """When it was last sent to."""
    busy_until: Mapped[datetime | None]
    """Of a sender that is sending to it, unless that has died."""


class WebhookDelivery(Base):
    """One event for one webhook: written with what it tells of, in one transaction (outbox.py)."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="webhook_deliveries_status"),
        Index("webhook_deliveries_due", "webhook_id", "next_attempt_at", postgresql_where=text("status = 'pending'")),
        Index("webhook_deliveries_done", "finished_at", postgresql_where=text("status <> 'pending'")),
    )

    webhook_id: Mapped[str] = mapped_column(Id, ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True)
    event_id: Mapped[str] = mapped_column(Id, primary_key=True)
    """The same for all webhooks that hear of the event."""
    type: Mapped[str]
    body: Mapped[str]
    """As it is sent, each time."""
    status: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    response_status: Mapped[int | None]
    """Of the last attempt that was answered."""
    error: Mapped[str | None]
    """Why the last attempt failed: a code of outbox.py."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    last_attempt_at: Mapped[datetime | None]
    next_attempt_at: Mapped[datetime | None] = mapped_column(server_default=func.clock_timestamp())
    """None once it is done with."""
    finished_at: Mapped[datetime | None]


class Metric(Base):
    """One optimiser step; a step repeated by a later attempt replaces the earlier row."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    loss: Mapped[float | None]
    """Nats per token; None where it was not finite."""
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    step_seconds: Mapped[float | None]
    tokens: Mapped[int | None]
    """Trained on since the start of the job, this step included."""
    peak_bytes: Mapped[int | None]
    validation_loss: Mapped[float | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Checkpoint(Base):
    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    validation_loss: Mapped[float | None]
    files: Mapped[list[dict[str, Any]]]
    """[{name, bytes, sha256}], the hash in hex."""
    path: Mapped[str]
    """Relative to the data folder."""
    is_best: Mapped[bool] = mapped_column(server_default=text("false"))


class ShapeCalibration(Base):
    """What finished jobs taught about one shape of model on one kind of device."""

    __tablename__ = "shape_calibrations"

    device: Mapped[str] = mapped_column(primary_key=True)
    shape: Mapped[str] = mapped_column(primary_key=True)
    """Hash of what the time of a step depends on beside the plan."""
    time_factor: Mapped[float]
    """Measured over predicted time of a step, in the calibration's own prediction."""
    jobs: Mapped[int]
    """That the factor was learned from."""
    peak_excess_bytes: Mapped[int] = mapped_column(server_default="0")
    """What the next plans count with beyond the memory model."""
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CalibrationRecord(Base):
    """What a worker measured of a device (slim_core's Calibration); the newest one counts, the others are history."""

    __tablename__ = "calibrations"

    device: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Counts the device's reports; a plan names the one that it was made with."""
    data: Mapped[dict[str, Any]]
    worker: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
