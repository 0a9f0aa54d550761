"""What an upload in parts is at this moment, as conditions of queries."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import ColumnElement, func

from service.models import PartUpload

PENDING, COMPLETED, CANCELLED, EXPIRED = "pending", "completed", "cancelled", "expired"
GRACE = timedelta(minutes=1)
"""For which parts are kept beyond the end: a transaction that found their upload open has ended by then."""


def is_claimed() -> ColumnElement[bool]:
    """A request is putting the parts together."""
    return func.coalesce(PartUpload.claimed_until > func.clock_timestamp(), False)


def is_open() -> ColumnElement[bool]:
    """It takes parts, and can be completed. Its hour does not end while a request reads the parts."""
    return (PartUpload.status == PENDING) & ((PartUpload.expires_at > func.clock_timestamp()) | is_claimed())


def keeps_parts() -> ColumnElement[bool]:
    """Its parts must not be removed yet."""
    end = func.greatest(PartUpload.expires_at, PartUpload.claimed_until)  # of those that are not NULL
    return (PartUpload.status == PENDING) & (end > func.clock_timestamp() - GRACE)
