"""How often somebody may ask: the generic cell rate algorithm, with one number kept for each of them.

Counted by each API process for itself; used on its event loop only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What came of asking."""

    allowed: bool
    limit: int
    remaining: int
    """Requests that may follow at once."""
    reset_seconds: int
    """Until the limit is whole again."""
    retry_seconds: int
    """Until the next request is allowed; 0 if it is now."""

    def headers(self) -> dict[str, str]:
        """draft-ietf-httpapi-ratelimit-headers-10."""
        return {
            "RateLimit-Policy": f'"requests";q={self.limit};w={MINUTE:.0f}',
            "RateLimit": f'"requests";r={self.remaining};t={self.reset_seconds}',
        }


class Rates:
    """Up to `limit` requests at once, and `limit` a minute in the long run. Of more than `capacity` names the one that
    has been silent for longest is forgotten, so that nobody can fill the memory with names."""

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When the whole limit is there again, by name."""

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, name: str, limit: int) -> Turn:
        """Ask for one request. One that is refused costs nothing."""
        now, interval = monotonic(), MINUTE / limit
        full_at = max(self._full_at.get(name, now), now) + interval
        wait = full_at - now - MINUTE
        allowed = wait <= 1e-9 * MINUTE  # of rounding
        if allowed:
            self._full_at[name] = full_at
            self._full_at.move_to_end(name)
            if len(self._full_at) > self._capacity:
                self._full_at.popitem(last=False)
        else:
            full_at -= interval
        remaining = max(0, math.floor((MINUTE - (full_at - now)) / interval + 1e-6))
        return Turn(allowed, limit, remaining, math.ceil(full_at - now), 0 if allowed else math.ceil(wait))

    def has_turn(self, name: str, limit: int) -> bool:
        """Whether `take` would be allowed now."""
        interval = MINUTE / limit
        return self._full_at.get(name, -math.inf) + interval - monotonic() <= MINUTE * (1 + 1e-9)
