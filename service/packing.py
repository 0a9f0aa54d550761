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
    expected_seconds: float = math.inf
    """How long it says that it will run."""
    blocked_seconds: float | None = None
    """Since it was its turn for the first time and it did not fit; None if that has not happened."""
    drain_seconds: float | None = None
    """How much longer the device, which is kept free for it, may start others; None if it is not."""
    reserved_elsewhere: bool = False
    """Whether another device is kept free for it."""


@dataclass(frozen=True, slots=True)
class Running:
    """A job that holds a part of the device."""

    memory_cap_bytes: int
    expected_seconds: float
    """Until its end, as far as one can tell."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a device does next."""

    start: Waiting | None = None
    blocked: Waiting | None = None
    """Whose turn it is, though it does not fit: the caller keeps since when."""
    reserved: Waiting | None = None
    """For whom the device is kept free: only what promises to be gone by then starts before it."""
    drain_seconds: float = 0.0
    """For how much longer it may. The caller keeps the moment, which must not move: promises may be broken."""


def choose(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    accounts: Mapping[str, float],
    device_bytes: int,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Choice:
    """The job to start, if any. `accounts` has what `account` gives for each tenant; one that is missing has 0.

    All of `waiting` would fit on the empty device. Identifiers sort by age.
    """
    free_bytes = device_bytes - sum(run.memory_cap_bytes for run in running)
    turns = sorted(waiting, key=lambda job: (accounts.get(job.tenant, 0.0), job.job_id))
    fitting = [job for job in turns if job.memory_cap_bytes <= free_bytes]
    overdue = [
        job
        for job in waiting
        if job.blocked_seconds is not None and job.blocked_seconds >= patience_seconds and not job.reserved_elsewhere
    ]
    if not overdue:
        start = fitting[0] if fitting else None
        blocked = turns[0] if turns and turns[0] is not start else None
        return Choice(start=start, blocked=blocked)
    first = min(overdue, key=lambda job: (-(job.blocked_seconds or 0.0), job.job_id))
    if first in fitting:
        return Choice(start=first, reserved=first)
    drain_seconds = first.drain_seconds
    if drain_seconds is None:
        drain_seconds = _seconds_until(running, first.memory_cap_bytes - free_bytes)
    filler = next((job for job in fitting if job.expected_seconds <= drain_seconds), None)
    return Choice(start=filler, reserved=first, drain_seconds=drain_seconds)


def _seconds_until(running: Sequence[Running], wanted_bytes: int) -> float:
    """When the jobs that end first will have given back as much as is wanted."""
    for run in sorted(running, key=lambda run: run.expected_seconds):
        wanted_bytes -= run.memory_cap_bytes
        if wanted_bytes <= 0:
            return run.expected_seconds
    return 0.0


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
    return -charged * math.expm1(-max(seconds, 0) / MEMORY_SECONDS)


def forgotten(past: float, seconds: float) -> float:
    """An average of `seconds` ago, as it counts now."""
    return past * math.exp(-max(seconds, 0) / MEMORY_SECONDS)
