"""Datasets of more formats, tokenizers, and the token files that a background job makes of both."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UNFINISHED = "status IN ('pending', 'running')"


def _id(name: str, *constraints: sa.ForeignKey, **options: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text(collation="C"), *constraints, **options)


def _text(name: str, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _bigint(name: str, default: str | None = None) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=default is None, server_default=default)


def _json(name: str) -> sa.Column[Any]:
    return sa.Column(name, JSONB(), nullable=True)


def _time(name: str, default: str | None = None) -> sa.Column[Any]:
    server_default = None if default is None else sa.text(default)
    return sa.Column(name, sa.DateTime(timezone=True), nullable=default is None, server_default=server_default)


def _prepared(table: str) -> tuple[sa.Column[Any] | sa.CheckConstraint, ...]:
    return (
        _text("status"),
        _bigint("attempt", default="0"),
        _bigint("failures", default="0"),
        _time("lease_until"),
        _time("retry_at"),
        _text("worker", nullable=True),
        _json("error"),
        _time("created_at", "clock_timestamp()"),
        _time("finished_at"),
        sa.CheckConstraint("status IN ('pending', 'running', 'ready', 'failed')", name=f"{table}_status"),
        sa.CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name=f"{table}_lease_while_running"),
    )


def upgrade() -> None:
    op.drop_constraint("datasets_format", "datasets")
    op.create_check_constraint("datasets_format", "datasets", "format IN ('txt', 'jsonl', 'parquet')")
    op.add_column("datasets", _text("compression", nullable=True))
    op.create_check_constraint("datasets_compression", "datasets", "compression IN ('gzip', 'zstd')")
    op.add_column("datasets", _text("kind", nullable=True))
    op.execute("UPDATE datasets SET kind = 'text'")
    op.create_check_constraint("datasets_kind", "datasets", "kind IN ('text', 'prompt_completion', 'messages')")
    for column in ("documents", "tokens", "longest_document_tokens"):
        op.alter_column("datasets", column, nullable=True)
    op.create_table(
        "tokenizers",
        _id("id", primary_key=True),
        _text("name"),
        _text("source"),
        _text("key", nullable=True),
        _text("path"),
        _bigint("vocab_size"),
        _bigint("wanted_vocab_size"),
        _id("dataset_id", nullable=True),
        *_prepared("tokenizers"),
        sa.CheckConstraint("source IN ('upload', 'trained')", name="tokenizers_source"),
    )
    op.create_table(
        "tokenizations",
        _id("dataset_id", sa.ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True),
        _id("key", primary_key=True),
        _text("tokenizer"),
        _text("tokenizer_path", nullable=True),
        _json("counts"),
        *_prepared("tokenizations"),
    )
    for table in ("tokenizers", "tokenizations"):
        op.create_index(f"{table}_unfinished", table, ["created_at"], postgresql_where=sa.text(UNFINISHED))
    op.execute(
        "INSERT INTO tokenizations (dataset_id, key, tokenizer, status)"
        " SELECT id, 'bytes', 'bytes', 'pending' FROM datasets"
    )
    op.add_column("jobs", _id("tokenizer_key", nullable=False, server_default="bytes"))
    op.add_column("jobs", _text("tokenizer_path", nullable=True))
    op.add_column("jobs", _id("tokenizer_id", nullable=True))


def downgrade() -> None:
    """Datasets that the older release cannot read are forgotten; their files stay."""
    for column in ("tokenizer_id", "tokenizer_path", "tokenizer_key"):
        op.drop_column("jobs", column)
    op.drop_table("tokenizations")
    op.drop_table("tokenizers")
    op.execute("DELETE FROM datasets WHERE tokens IS NULL OR compression IS NOT NULL OR kind <> 'text'")
    for column in ("documents", "tokens", "longest_document_tokens"):
        op.alter_column("datasets", column, nullable=False)
    for constraint in ("datasets_kind", "datasets_compression", "datasets_format"):
        op.drop_constraint(constraint, "datasets")
    op.drop_column("datasets", "kind")
    op.drop_column("datasets", "compression")
    op.create_check_constraint("datasets_format", "datasets", "format IN ('txt', 'jsonl')")
