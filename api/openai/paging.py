"""What the lists of the adapter have in common."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query

MAX_PAGE = 100

Limit = Annotated[
    int,
    Query(
        ge=1,
        le=10_000,
        description=f"The most entries to answer; no answer has more than {MAX_PAGE}, and `has_more` then says so.",
    ),
]


def page_size(limit: int) -> int:
    """Entries of an answer to a client that would take `limit`."""
    return min(limit, MAX_PAGE)
