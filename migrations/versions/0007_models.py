"""Models that users upload, beside the outputs of jobs."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

CHECKS = {
    "models_kind": "kind IN ('output', 'upload')",
    "models_job": "(kind = 'output') = (job_id IS NOT NULL AND step IS NOT NULL)",
    "models_described": "status <> 'ready' OR config IS NOT NULL AND layout IS NOT NULL",
    "models_status": "status IN ('pending', 'running', 'ready', 'failed')",
    "models_lease_while_running": "(status = 'running') = (lease_until IS NOT NULL)",
}


def _text(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=True)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")


def _time(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=True)


def upgrade() -> None:
    columns: tuple[sa.Column[Any], ...] = (
        sa.Column("kind", sa.Text(), nullable=False, server_default="output"),
        sa.Column("status", sa.Text(), nullable=False, server_default="ready"),
        _count("attempt"),
        _count("failures"),
        _time("lease_until"),
        _time("retry_at"),
        _text("worker"),
        sa.Column("error", JSONB(), nullable=True),
        _time("finished_at"),
        sa.Column("layout", sa.Text(), nullable=True, server_default="slimtune"),
        sa.Column("files", JSONB(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("tokenizer_key", sa.Text(collation="C"), nullable=True),
        _text("tokenizer_path"),
    )
    for column in columns:
        op.add_column("models", column)
    for name in ("kind", "status", "layout"):
        op.alter_column("models", name, server_default=None)  # it was for the rows that were there
    for name in ("job_id", "step", "config"):
        op.alter_column("models", name, nullable=True)
    op.alter_column("models", "created_at", server_default=sa.text("clock_timestamp()"))
    for name, condition in CHECKS.items():
        op.create_check_constraint(name, "models", condition)
    unfinished = sa.text("status IN ('pending', 'running')")
    op.create_index("models_unfinished", "models", ["created_at"], postgresql_where=unfinished)


def downgrade() -> None:
    """Uploads are forgotten; their files stay."""
    op.execute("DELETE FROM models WHERE kind = 'upload'")
    op.drop_index("models_unfinished", "models")
    for name in CHECKS:
        op.drop_constraint(name, "models")
    op.alter_column("models", "created_at", server_default=sa.text("now()"))
    for name in ("job_id", "step", "config"):
        op.alter_column("models", name, nullable=False)
    prepared = ("status", "attempt", "failures", "lease_until", "retry_at", "worker", "error", "finished_at")
    for name in (*prepared, "kind", "layout", "files", "bytes", "tokenizer_key", "tokenizer_path"):
        op.drop_column("models", name)
