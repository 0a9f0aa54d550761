"""Jobs know the trace that they came by; attempts given back stay counted when the job that they were of is deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("trace", sa.Text(), nullable=True))
    op.create_table(
        "deleted_given_back",
        sa.Column("reason", sa.Text(), primary_key=True),
        sa.Column("count", sa.BigInteger(), nullable=False),
    )
    # The reason is that of service/telemetry.py. Sorted, so that two deletions at once take the rows in one order.
    op.execute(
        """
        CREATE FUNCTION job_events_count_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO deleted_given_back AS counted (reason, count)
            SELECT coalesce(data ->> 'reason', type) AS reason, count(*) FROM deleted
            WHERE type IN ('requeued', 'replanned') GROUP BY 1 ORDER BY 1
            ON CONFLICT (reason) DO UPDATE SET count = counted.count + excluded.count;
            RETURN NULL;
        END
        $$
        """
    )
    op.execute(
        """
        CREATE TRIGGER job_events_deleted AFTER DELETE ON job_events REFERENCING OLD TABLE AS deleted
        FOR EACH STATEMENT EXECUTE FUNCTION job_events_count_deleted()
        """
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER job_events_deleted ON job_events")
    op.execute("DROP FUNCTION job_events_count_deleted()")
    op.drop_table("deleted_given_back")
    op.drop_column("jobs", "trace")
