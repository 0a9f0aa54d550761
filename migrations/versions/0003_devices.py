"""Devices and their memory, tenants of jobs, and what the choice of the next job needs to know."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = ("tenant", "device_id", "charged_bytes", "claimed_at", "blocked_since")


def _id(name: str, **options: bool | str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(collation="C"), **options)  # type: ignore[arg-type]


def upgrade() -> None:
    op.create_table(
        "devices",
        _id("id", primary_key=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("slots", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        _id("reserved_for"),
        sa.Column("reserved_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
    )
    op.create_table(
        "tenant_usage",
        _id("tenant", primary_key=True),
        sa.Column("held_bytes", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
    )
    op.add_column("jobs", _id("tenant", nullable=False, server_default="default"))
    op.add_column("jobs", _id("device_id"))
    op.add_column("jobs", sa.Column("charged_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("blocked_since", sa.DateTime(timezone=True), nullable=True))
    op.create_index("jobs_queued", "jobs", ["tenant", "id"], postgresql_where=sa.text("status = 'queued'"))
    op.create_index("jobs_running", "jobs", ["device_id"], postgresql_where=sa.text("status = 'running'"))


def downgrade() -> None:
    op.drop_index("jobs_running", "jobs")
    op.drop_index("jobs_queued", "jobs")
    for column in COLUMNS:
        op.drop_column("jobs", column)
    op.drop_table("tenant_usage")
    op.drop_table("devices")
