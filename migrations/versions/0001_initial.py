"""Datasets, models, jobs with their events, metrics and checkpoints, calibrations."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _id(name: str, *constraints: sa.ForeignKey, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text(collation="C"), *constraints, **options)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _bigint(name: str, nullable: bool = False, default: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable, server_default=default)


def _float(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=True)


def _json(name: str, nullable: bool = False, default: sa.TextClause | None = None) -> sa.Column[Any]:
    return sa.Column(name, JSONB(), nullable=nullable, server_default=default)


def _time(name: str, default: str | None = None) -> sa.Column[Any]:
    server_default = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=default is None, server_default=server_default)


def _job_key(primary_key: bool) -> sa.Column[str]:
    return _id("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, primary_key=primary_key)


def upgrade() -> None:
    _create_datasets()
    _create_jobs()
    _create_terminal_trigger()
    _create_models()
    _create_reports()
    op.create_table(
        "calibrations",
        sa.Column("device", sa.Text(), primary_key=True),
        _bigint("version", default="1"),
        _json("data"),
        _text("worker"),
        _time("updated_at", "now()"),
    )


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        _id("id", primary_key=True),
        _text("name"),
        _text("filename"),
        _text("format"),
        _bigint("bytes"),
        _bigint("documents"),
        _bigint("tokens"),
        _bigint("longest_document_tokens"),
        _text("sha256"),
        _json("problems"),
        _time("created_at", "now()"),
        sa.CheckConstraint("format IN ('txt', 'jsonl')", name="datasets_format"),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        _id("id", primary_key=True),
        _text("name", nullable=True),
        _text("status"),
        _text("desired"),
        _json("spec"),
        _json("train"),
        _json("model_config"),
        _json("plan"),
        _bigint("memory_cap_bytes"),
        _id("dataset_id", nullable=False),
        _id("validation_dataset_id"),
        _id("base_model_id"),
        _text("model"),
        _time("created_at", "now()"),
        _time("started_at"),
        _time("finished_at"),
        _bigint("attempt", default="0"),
        _bigint("failures", default="0"),
        _bigint("memory_replans", default="0"),
        _time("lease_until"),
        _text("worker", nullable=True),
        _bigint("step", default="0"),
        _bigint("total_steps"),
        _bigint("tokens", default="0"),
        _float("loss"),
        _float("step_seconds"),
        _bigint("predicted_peak_bytes"),
        _bigint("measured_peak_bytes", nullable=True),
        _id("output_model_id"),
        _json("error", nullable=True),
        _json("metadata", default=sa.text("'{}'")),
        sa.CheckConstraint(
            "status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name="jobs_status"
        ),
        sa.CheckConstraint("desired IN ('run', 'pause', 'cancel')", name="jobs_desired"),
        sa.CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="jobs_lease_while_running"),
    )
    op.create_index("jobs_status_id", "jobs", ["status", "id"])
    op.create_index("jobs_lease", "jobs", ["lease_until"], postgresql_where=sa.text("status = 'running'"))


def _create_terminal_trigger() -> None:
    op.execute(
        """
        CREATE FUNCTION jobs_refuse_leaving_terminal() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'job % is %, which is final', OLD.id, OLD.status USING ERRCODE = 'check_violation';
        END
        $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER jobs_terminal BEFORE UPDATE ON jobs FOR EACH ROW
        WHEN (OLD.status IN ('succeeded', 'failed', 'cancelled') AND NEW.status IS DISTINCT FROM OLD.status)
        EXECUTE FUNCTION jobs_refuse_leaving_terminal()
        """
    )


def _create_models() -> None:
    op.create_table(
        "models",
        _id("id", primary_key=True),
        _text("name"),
        _id("job_id", sa.ForeignKey("jobs.id"), nullable=False),
        _bigint("step"),
        _json("config"),
        _text("path"),
        _time("created_at", "now()"),
    )
    op.create_index("ix_models_job_id", "models", ["job_id"])


def _create_reports() -> None:
    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), primary_key=True),
        _job_key(primary_key=False),
        _bigint("attempt"),
        _time("created_at", "clock_timestamp()"),
        _text("type"),
        _json("data"),
    )
    op.create_index("job_events_job_id_id", "job_events", ["job_id", "id"])
    op.create_table(
        "metrics",
        _job_key(primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True, autoincrement=False),
        _bigint("attempt"),
        *(_float(name) for name in ("loss", "learning_rate", "grad_norm", "step_seconds")),
        *(_bigint(name, nullable=True) for name in ("tokens", "peak_bytes")),
        _float("validation_loss"),
        _time("created_at", "clock_timestamp()"),
    )
    op.create_table(
        "checkpoints",
        _job_key(primary_key=True),
        sa.Column("step", sa.BigInteger(), primary_key=True, autoincrement=False),
        _bigint("attempt"),
        _time("created_at", "clock_timestamp()"),
        _float("validation_loss"),
        _json("files"),
        _text("path"),
        sa.Column("is_best", sa.Boolean(), nullable=False, server_default=sa.text("false")),
    )


def downgrade() -> None:
    for table in ("calibrations", "checkpoints", "metrics", "job_events", "models", "jobs", "datasets"):
        op.drop_table(table)
    op.execute("DROP FUNCTION jobs_refuse_leaving_terminal()")
