"""Whose everything is, and the keys of who may ask.

What is there belongs to the tenant `default`. Tokenizers of before count 0 bytes: how large their files are is not in
the database. A downgrade drops all keys and merges the tenants' datasets, tokenizers and models: an API of before has
none, and shows everything to everybody. Upgraded again, these are all the `default` tenant's.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

OWNED = ("datasets", "tokenizers", "models")


def _time(name: str, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.DateTime(timezone=True), **options)


def _limit(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger(), nullable=True)


def upgrade() -> None:
    for table in OWNED:
        column: sa.Column[Any] = sa.Column("tenant", sa.Text(collation="C"), nullable=False, server_default="default")
        op.add_column(table, column)
        op.create_index(f"{table}_tenant_id", table, ["tenant", "id"])
    op.create_index("jobs_tenant_id", "jobs", ["tenant", "id"])
    op.create_index("jobs_tenant_status_id", "jobs", ["tenant", "status", "id"])
    op.add_column("tokenizers", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(collation="C"), primary_key=True),
        sa.Column("tenant", sa.Text(collation="C"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(collation="C"), nullable=False, unique=True),
        sa.Column("prefix", sa.Text(), nullable=False),
        _time("created_at", nullable=False, server_default=sa.text("now()")),
        _time("expires_at", nullable=True),
        _time("revoked_at", nullable=True),
        _time("last_used_at", nullable=True),
        _limit("requests_per_minute"),
        _limit("max_jobs"),
        _limit("max_bytes"),
    )


def downgrade() -> None:
    op.drop_table("api_keys")
    op.drop_column("tokenizers", "bytes")
    for index in ("jobs_tenant_status_id", "jobs_tenant_id"):
        op.drop_index(index, "jobs")
    for table in OWNED:
        op.drop_index(f"{table}_tenant_id", table)
        op.drop_column(table, "tenant")
