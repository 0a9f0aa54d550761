"""Uploads in parts, and datasets that expire."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def _id(name: str, *arguments: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(collation="C"), *arguments, **options)


def _time(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), **options)


def upgrade() -> None:
    op.create_table(
        "uploads",
        _id("id", primary_key=True),
        _id("tenant", nullable=False, server_default="default"),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        _time("created_at", nullable=False, server_default=sa.text("now()")),
        _time("expires_at", nullable=False),
        sa.Column("file_expires_seconds", sa.BigInteger(), nullable=True),
        sa.Column("claim", sa.Text(), nullable=True),
        _time("claimed_until", nullable=True),
        _time("completed_at", nullable=True),
        _id("dataset_id", nullable=True),
        sa.CheckConstraint("status IN ('pending', 'completed', 'cancelled')", name="uploads_status"),
        sa.CheckConstraint("(status = 'completed') = (completed_at IS NOT NULL)", name="uploads_completed"),
    )
    op.create_index("uploads_tenant_status", "uploads", ["tenant", "status"])
    op.create_index("uploads_expires_at", "uploads", ["expires_at"])
    op.create_table(
        "upload_parts",
        _id("id", primary_key=True),
        _id("tenant", nullable=False, server_default="default"),
        _id("upload_id", sa.ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        _time("created_at", nullable=False, server_default=sa.text("now()")),
    )
    op.create_index("upload_parts_upload_id", "upload_parts", ["upload_id"])
    op.add_column("datasets", _time("expires_at", nullable=True))
    there = sa.text("expires_at IS NOT NULL")
    op.create_index("datasets_expires_at", "datasets", ["expires_at"], postgresql_where=there)


def downgrade() -> None:
    """Parts that wait are forgotten; the sweeper of this version would have removed their files."""
    op.drop_index("datasets_expires_at", "datasets")
    op.drop_column("datasets", "expires_at")
    op.drop_table("upload_parts")
    op.drop_table("uploads")
