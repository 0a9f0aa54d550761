"""Threads for work that takes long: so many for each tenant, so that none waits for another's."""

from __future__ import annotations

from anyio import CapacityLimiter


class Places:
    """A limiter for each tenant that has asked for one; there are as many tenants as an operator made keys for."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._limiters: dict[str, CapacityLimiter] = {}

    def of(self, tenant: str) -> CapacityLimiter:
        """The tenant's own."""
        if tenant not in self._limiters:
            self._limiters[tenant] = CapacityLimiter(self._each)
        return self._limiters[tenant]
