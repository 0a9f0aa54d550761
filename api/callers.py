"""Who asks, as routes and the session see it."""

from __future__ import annotations

from dataclasses import dataclass

from service.limits import UNLIMITED, Limits


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant that a request is for, and what it may have."""

    tenant: str
    key_id: str | None = None
    """None where no key is needed."""
    limits: Limits = UNLIMITED
