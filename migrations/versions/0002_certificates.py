"""What a job's certificate needs, the probed peak and the gradient check; what finished jobs teach the planner."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("probed_peak_bytes", sa.BigInteger(), nullable=True))
    op.add_column("jobs", sa.Column("gradient_check", JSONB(), nullable=True))
    fields = "'max_sequence_length', 0, 'check_chunk_length', NULL, 'time_factor', 1.0"
    op.execute(f"UPDATE jobs SET plan = jsonb_build_object({fields}) || plan")  # noqa: S608  # no input
    op.create_table(
        "shape_calibrations",
        sa.Column("device", sa.Text(), primary_key=True),
        sa.Column("shape", sa.Text(), primary_key=True),
        sa.Column("time_factor", sa.Double(), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
    )


def downgrade() -> None:
    op.drop_table("shape_calibrations")
    op.drop_column("jobs", "gradient_check")
    op.drop_column("jobs", "probed_peak_bytes")
