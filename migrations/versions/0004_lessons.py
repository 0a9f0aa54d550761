"""Calibrations keep their history; jobs teach peaks beside times, and have a typical step for their remaining time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _key_calibrations_by("device", "version")
    op.alter_column("calibrations", "version", server_default=None)
    op.alter_column(
        "calibrations", "updated_at", new_column_name="created_at", server_default=sa.text("clock_timestamp()")
    )
    op.add_column(
        "shape_calibrations", sa.Column("peak_excess_bytes", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.add_column("jobs", sa.Column("typical_step_seconds", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "typical_step_seconds")
    op.drop_column("shape_calibrations", "peak_excess_bytes")
    op.execute(
        "DELETE FROM calibrations AS old USING calibrations AS new "
        "WHERE old.device = new.device AND old.version < new.version"
    )
    op.alter_column("calibrations", "created_at", new_column_name="updated_at", server_default=sa.text("now()"))
    op.alter_column("calibrations", "version", server_default="1")
    _key_calibrations_by("device")


def _key_calibrations_by(*columns: str) -> None:
    op.drop_constraint("calibrations_pkey", "calibrations")
    op.create_primary_key("calibrations_pkey", "calibrations", list(columns))
