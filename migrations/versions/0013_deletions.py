"""What deleting jobs and thinning out their metrics needs to find quickly."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.online import create_index

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("thinned_at", sa.DateTime(timezone=True), nullable=True), if_not_exists=True)
    column: sa.Column[str] = sa.Column("job_id", sa.Text(collation="C"), nullable=True)
    op.add_column("webhook_deliveries", column, if_not_exists=True)
    create_index("jobs_finished", "jobs", ["finished_at"], where="finished_at IS NOT NULL")
    create_index("webhook_deliveries_job_id", "webhook_deliveries", ["job_id"], where="job_id IS NOT NULL")


def downgrade() -> None:
    op.drop_column("webhook_deliveries", "job_id")
    op.drop_index("jobs_finished", "jobs")
    op.drop_column("jobs", "thinned_at")
