"""How often attempts were given back is counted without reading all events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    where = sa.text("type IN ('requeued', 'replanned')")
    op.create_index("job_events_given_back", "job_events", ["type"], postgresql_where=where)


def downgrade() -> None:
    op.drop_index("job_events_given_back", "job_events")
