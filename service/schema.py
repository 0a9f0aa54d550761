"""The revision of the database's schema: which one this code was written for, and which one is there."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

REVISION = "0014"
"""The newest migration: what the tables of models.py are after it. Revisions are numbers of four digits."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What is wanted and what is there."""

    found: str | None
    """None: no migration has been run."""
    expected: str = REVISION

    @property
    def is_usable(self) -> bool:
        """A newer one is: migrations only take away what no code uses any more that may still run."""
        return self.found is not None and self.found >= self.expected


def look(session: Session) -> Schema:
    """The database's revision. Raises SQLAlchemyError if it cannot be reached."""
    try:
        with session.begin_nested():
            return Schema(session.scalar(text("SELECT version_num FROM alembic_version")))
    except ProgrammingError:  # there is no such table
        return Schema(None)
