"""Webhooks, and what they are to be told."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def _text(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, sa.Text(), nullable=nullable)


def _time(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), **options)


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Text(collation="C"), primary_key=True),
        sa.Column("tenant", sa.Text(collation="C"), nullable=False, server_default="default"),
        _text("name", nullable=True),
        _text("url"),
        sa.Column("events", ARRAY(sa.Text()), nullable=False),
        _text("secret"),
        _text("old_secret", nullable=True),
        _time("old_secret_until"),
        _time("created_at", nullable=False, server_default=sa.text("now()")),
        _time("disabled_at"),
        _text("disabled_reason", nullable=True),
        _time("failing_since"),
        _time("sent_at"),
        _time("busy_until"),
    )
    op.create_index("webhooks_tenant_id", "webhooks", ["tenant", "id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column(
            "webhook_id", sa.Text(collation="C"), sa.ForeignKey("webhooks.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("event_id", sa.Text(collation="C"), primary_key=True),
        _text("type"),
        _text("body"),
        sa.Column("status", sa.Text(), nullable=False, server_default="pending"),
        sa.Column("attempts", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("response_status", sa.BigInteger(), nullable=True),
        _text("error", nullable=True),
        _time("created_at", nullable=False, server_default=sa.text("clock_timestamp()")),
        _time("last_attempt_at"),
        _time("next_attempt_at", server_default=sa.text("clock_timestamp()")),
        _time("finished_at"),
        sa.CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="webhook_deliveries_status"),
    )
    op.create_index(
        "webhook_deliveries_due",
        "webhook_deliveries",
        ["webhook_id", "next_attempt_at"],
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index(
        "webhook_deliveries_done",
        "webhook_deliveries",
        ["finished_at"],
        postgresql_where=sa.text("status <> 'pending'"),
    )


def downgrade() -> None:
    op.drop_table("webhook_deliveries")
    op.drop_table("webhooks")
