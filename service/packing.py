"""Which job a device starts next. Pure: no SQL and no clock, so that the claim and a simulation can share it.

First in, first out within a tenant; between tenants the one goes first that holds and has held the least; a job that
does not fit when it is its turn may be passed for a while and then has the device kept free for it
(docs/decisions/0009-packing-by-bytes.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

PATIENCE_SECONDS = 600.0
"""How long others may pass a job that does not fit when it is its turn, before the device is kept free for it."""
MEMORY_SECONDS = 3_600.0
"""Time constant with which it is forgotten what a tenant held."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The first job of one tenant's queue that the device could hold if it were empty."""

    job_id: str
    tenant: str
    memory_cap_bytes: int
    blocked_seconds: float | None = None
    """Since it was its turn for the first time and it did not fit; None if that has not happened."""
    reserved_elsewhere: bool = False
    """Whether another device is kept free for it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a device does next."""

    start: Waiting | None = None
    blocked: Waiting | None = None
    """Whose turn it is, though it does not fit: the caller keeps since when."""
    reserved: Waiting | None = None
    """For whom the device is kept free: until it starts, nothing else does."""


def choose(
    waiting: Sequence[Waiting],
    accounts: Mapping[str, float],
    free_bytes: int,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Choice:
    """The job to start, if any. `accounts` has what `account` gives for each tenant; one that is missing has 0.

    All of `waiting` would fit on the empty device. Identifiers sort by age.
    """
    overdue = [
        job
        for job in waiting
        if job.blocked_seconds is not None and job.blocked_seconds >= patience_seconds and not job.reserved_elsewhere
    ]
    if overdue:
        first = min(overdue, key=lambda job: (-(job.blocked_seconds or 0.0), job.job_id))
        return Choice(start=first if first.memory_cap_bytes <= free_bytes else None, reserved=first)
    turns = sorted(waiting, key=lambda job: (accounts.get(job.tenant, 0.0), job.job_id))
    start = next((job for job in turns if job.memory_cap_bytes <= free_bytes), None)
    blocked = turns[0] if turns and turns[0] is not start else None
    return Choice(start=start, blocked=blocked)


def charged_bytes(memory_cap_bytes: int, device_bytes: int, slots: int) -> int:
    """What a running job counts as: its cap, and at least its slot's share of the device, which others lack as much."""
    return max(memory_cap_bytes, device_bytes // slots)


def account(past: float, runs: Iterable[tuple[int, float]]) -> float:
    """What a tenant holds now and has held of late, in bytes: the sum of both.

    `past` is the average of what its ended runs held (`remembered`, `forgotten`); `runs` are (charged bytes, seconds
    so far) of those that go on.
    """
    return past + sum(charged + remembered(charged, seconds) for charged, seconds in runs)


def remembered(charged: int, seconds: float) -> float:
    """What a run of `seconds`, up to now, adds to the average of what its tenant held: bytes, weighted by recency."""
    return -charged * math.expm1(-seconds / MEMORY_SECONDS)


def forgotten(past: float, seconds: float) -> float:
    """An average of `seconds` ago, as it counts now."""
    return past * math.exp(-seconds / MEMORY_SECONDS)
