"""What a migration does to a table that is in use (docs/operating.md has the rules)."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op


def create_index(name: str, table: str, columns: Sequence[str], *, where: str | None = None) -> None:
    """Make an index while others write to its table.

    What the migration has done before is committed then, so that it must bear being run again (`if_not_exists`), as
    this does: an attempt that broke off leaves an index that nobody may use.
    """
    with op.get_context().autocommit_block():
        # It waits until transactions end that were there before it, and holds up nobody meanwhile.
        op.execute("SET lock_timeout = 0")
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        condition = None if where is None else sa.text(where)
        op.create_index(name, table, list(columns), postgresql_concurrently=True, postgresql_where=condition)
        op.execute("RESET lock_timeout")
