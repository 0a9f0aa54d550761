"""One device on a virtual clock: jobs arrive, a policy chooses what starts, and nothing is measured but what happened.

The policy is the service's own (`service.packing.choose`), or one of those beside it here.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from service import packing
from service.packing import Choice, Running, Waiting

GIB = 1 << 30
MINUTE, HOUR = 60.0, 3_600.0
DEVICE_BYTES = 64 * GIB
SLOTS = 12
LARGE_SECONDS = 8 * HOUR
"""Between two jobs that want most of the device."""
NEWCOMER_AT = 36 * HOUR

Policy = Callable[[Sequence[Waiting], Sequence[Running], Mapping[str, float], int], Choice]


@dataclass(frozen=True, slots=True)
class Job:
    """What a tenant asks for, and how long it will take, which no policy sees but as an expectation that is wrong."""

    id: str
    tenant: str
    memory_cap_bytes: int
    seconds: float
    expected_seconds: float
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Run:
    """A job that got the device. Times in seconds of the virtual clock."""

    job: Job
    started_at: float
    blocked_at: float | None
    """When it was its turn for the first time and it did not fit."""

    @property
    def ended_at(self) -> float:
        return self.started_at + self.job.seconds

    @property
    def waited(self) -> float:
        """Since it arrived."""
        return self.started_at - self.job.arrived_at

    @property
    def blocked_seconds(self) -> float:
        """Since it was its turn."""
        return 0.0 if self.blocked_at is None else self.started_at - self.blocked_at


def fifo(
    waiting: Sequence[Waiting], running: Sequence[Running], _accounts: Mapping[str, float], device_bytes: int
) -> Choice:
    """One queue for all, and nobody passes anybody."""
    first = min(waiting, key=lambda job: job.job_id, default=None)
    free_bytes = device_bytes - sum(run.memory_cap_bytes for run in running)
    return Choice(start=first if first is not None and first.memory_cap_bytes <= free_bytes else None)


def without_reservation(
    waiting: Sequence[Waiting], running: Sequence[Running], accounts: Mapping[str, float], device_bytes: int
) -> Choice:
    """The service's policy, but a job that does not fit may be passed for ever."""
    return packing.choose(waiting, running, accounts, device_bytes, patience_seconds=math.inf)


class Simulation:
    """The device and its queues."""

    def __init__(self, policy: Policy, device_bytes: int = DEVICE_BYTES, slots: int = SLOTS) -> None:
        self._policy = policy
        self._device_bytes = device_bytes
        self._slots = slots
        self._queues: dict[str, deque[Job]] = defaultdict(deque)
        self._blocked_at: dict[str, float] = {}
        self._reserved: tuple[str, float] | None = None
        """The job for which the device is kept free, and the time until which others may start."""
        self._running: dict[str, Run] = {}
        self._past: dict[str, tuple[float, float]] = {}
        """By tenant: the average of what its ended runs held, and the time as of which."""
        self.runs: list[Run] = []

    def run(self, jobs: Iterable[Job]) -> list[Run]:
        """Play until every job has run; the runs in order of their starts."""
        events: list[tuple[float, str, Job]] = [(job.arrived_at, job.id, job) for job in jobs]
        heapq.heapify(events)
        while events:
            now, _, job = heapq.heappop(events)
            if job.id in self._running:
                self._end(job, now)
            else:
                self._queues[job.tenant].append(job)
            while len(self._running) < self._slots and (run := self._start(now)) is not None:
                heapq.heappush(events, (run.ended_at, run.job.id, run.job))
        return self.runs

    def _start(self, now: float) -> Run | None:
        heads = [queue[0] for queue in self._queues.values() if queue]
        running = [
            Running(run.job.memory_cap_bytes, max(0.0, run.started_at + run.job.expected_seconds - now))
            for run in self._running.values()
        ]
        choice = self._policy(
            [self._waiting(job, now) for job in heads], running, self._accounts(now), self._device_bytes
        )
        if choice.blocked is not None:
            self._blocked_at.setdefault(choice.blocked.job_id, now)
        if choice.reserved is None or choice.start is choice.reserved:
            self._reserved = None
        elif self._reserved is None or self._reserved[0] != choice.reserved.job_id:
            self._reserved = choice.reserved.job_id, now + choice.drain_seconds
        if choice.start is None:
            return None
        run = Run(self._queues[choice.start.tenant].popleft(), now, self._blocked_at.get(choice.start.job_id))
        assert run.job.id == choice.start.job_id
        self._running[run.job.id] = run
        self.runs.append(run)
        return run

    def _waiting(self, job: Job, now: float) -> Waiting:
        reserved = self._reserved is not None and self._reserved[0] == job.id
        return Waiting(
            job.id,
            job.tenant,
            job.memory_cap_bytes,
            expected_seconds=job.expected_seconds,
            blocked_seconds=now - self._blocked_at[job.id] if job.id in self._blocked_at else None,
            drain_seconds=self._reserved[1] - now if self._reserved is not None and reserved else None,
        )

    def _end(self, job: Job, now: float) -> None:
        seconds = now - self._running.pop(job.id).started_at
        held, at = self._past.get(job.tenant, (0.0, now))
        added = packing.remembered(self._charged(job), seconds)
        self._past[job.tenant] = (packing.forgotten(held, now - at) + added, now)

    def _accounts(self, now: float) -> dict[str, float]:
        runs: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for run in self._running.values():
            runs[run.job.tenant].append((self._charged(run.job), now - run.started_at))
        accounts = {}
        for tenant in self._queues:
            held, at = self._past.get(tenant, (0.0, now))
            accounts[tenant] = packing.account(packing.forgotten(held, now - at), runs[tenant])
        return accounts

    def _charged(self, job: Job) -> int:
        return packing.charged_bytes(job.memory_cap_bytes, self._device_bytes, self._slots)


def a_week(seed: int, scale: float = 1.0) -> list[Job]:
    """Tenants that differ in all that a policy could favour; `scale` shortens everyone's queue.

    `flood` comes first with thousands of jobs, `short`, `long` and `wide` follow within a minute, `newcomer` on the
    second day. `large` wants most of the device, now and then, as long as there is work for days. Two expectations of
    three are right within a factor of 1.6.
    """
    random_source = random.Random(seed)  # noqa: S311  # a simulation
    between, tailed = random_source.uniform, functools.partial(_heavy_tailed, random_source)
    jobs: list[tuple[float, str, float, float]] = []

    def add(tenant: str, count: int, arrived_at: float, gib: Callable[[], float], seconds: Callable[[], float]) -> None:
        jobs.extend((arrived_at, tenant, gib(), seconds()) for _ in range(max(1, int(count * scale))))

    add("flood", 4_000, 0.0, lambda: between(1, 6), lambda: tailed(12 * MINUTE))
    add("short", 2_000, 30.0, lambda: between(0.5, 2), lambda: tailed(4 * MINUTE))
    add("long", 120, 30.0, lambda: between(4, 8), lambda: between(2, 6) * HOUR)
    add("wide", 500, 60.0, lambda: between(12, 24), lambda: tailed(10 * MINUTE))
    add("newcomer", 400, NEWCOMER_AT * min(1.0, scale), lambda: between(1, 6), lambda: tailed(12 * MINUTE))
    for number in range(1, 1 + max(1, int(12 * scale))):
        arrived_at = number * LARGE_SECONDS * min(1.0, 4 * scale)
        add("large", 1, arrived_at, lambda: between(48, 64), lambda: between(20, 40) * MINUTE)
    jobs.sort(key=lambda job: job[0])
    return [
        Job(
            f"job_{number:06d}",
            tenant,
            int(gib * GIB),
            seconds,
            seconds * random_source.lognormvariate(0.0, 0.5),
            arrived_at,
        )
        for number, (arrived_at, tenant, gib, seconds) in enumerate(jobs)
    ]


def _heavy_tailed(random_source: random.Random, median_seconds: float) -> float:
    """Log-normal: one in a hundred takes eleven times the median; none takes longer than six hours."""
    return min(median_seconds * random_source.lognormvariate(0.0, 1.03), 6 * HOUR)


def largest_sum_of_caps(runs: Iterable[Run]) -> int:
    """The most bytes that ran at any one time; an end and a start at the same moment do not overlap."""
    changes = sorted(
        change
        for run in runs
        for change in (
            (run.started_at, 1, run.job.memory_cap_bytes),
            (run.ended_at, 0, -run.job.memory_cap_bytes),
        )
    )
    held = largest = 0
    for _, _, change in changes:
        held += change
        largest = max(largest, held)
    return largest


def out_of_order(runs: Iterable[Run]) -> int:
    """How many jobs started before an older one of their tenant's."""
    newest: dict[str, str] = {}
    count = 0
    for run in runs:
        count += run.job.id < newest.get(run.job.tenant, "")
        newest[run.job.tenant] = max(run.job.id, newest.get(run.job.tenant, ""))
    return count


def held(runs: Iterable[Run], since: float, until: float, *, charged: bool = True) -> dict[str, float]:
    """Average bytes that each tenant held in this time; with `charged` a job counts as at least its slot's share."""
    totals: dict[str, float] = defaultdict(float)
    for run in runs:
        seconds = min(run.ended_at, until) - max(run.started_at, since)
        if seconds > 0:
            cap = run.job.memory_cap_bytes
            counted = packing.charged_bytes(cap, DEVICE_BYTES, SLOTS) if charged else cap
            totals[run.job.tenant] += counted * seconds / (until - since)
    return totals


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all have the same, 1/n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))
