"""Keyset pages: a part of a list, and whether there is more of it."""

from __future__ import annotations

from typing import TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")


def take(session: Session, query: Select[Row], limit: int) -> tuple[list[Row], bool]:
    """The first `limit` rows of a query for one entity, and whether it has more."""
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def newest_first(
    session: Session, query: Select[Row], identifier: InstrumentedAttribute[str], after: str | None, limit: int
) -> tuple[list[Row], bool]:
    """Up to `limit` rows created before the one whose `identifier` is `after`, and whether there are more."""
    if after is not None:
        query = query.where(identifier < after)
    return take(session, query.order_by(identifier.desc()), limit)
