"""What a key allows beside access. None: no limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key."""

    requests_per_minute: int | None = None
    max_jobs: int | None = None
    """Unfinished jobs of the key's tenant."""
    max_bytes: int | None = None
    """What the tenant's datasets, tokenizers, models, checkpoints and open uploads may hold together."""


UNLIMITED = Limits()
