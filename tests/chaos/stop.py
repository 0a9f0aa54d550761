"""Cancels and pauses of jobs in every state, with real supervisors and heartbeats as slow as a service's."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.arena import Arena, FragileServers
from tests.chaos.fault import Fault
from tests.integration.stage import Stage, alive, wait_for

LONG = 100_000
"""Steps of a job that does not end by itself."""
PROMISED_SECONDS = 10.0
PAUSE_SECONDS = 60.0 + PROMISED_SECONDS
"""Of a trainer that does not stop: it has 60 s for its checkpoint."""
HEARTBEAT_SECONDS = 5.0
"""The default of the service."""


@dataclass(frozen=True)
class Case:
    """What the job is doing when its user has had enough."""

    doing: Literal["queued", "paused", "starting", "training", "saving", "deaf", "busy", "no database"]
    action: Literal["cancel", "pause"]
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the fake trainer."""
    limit_seconds: float = PROMISED_SECONDS

    def __str__(self) -> str:
        return f"{self.action} while {self.doing}"


QUIET: Mapping[str, object] = {"step_seconds": 3.0}
SAVING: Mapping[str, object] = {"checkpoint_every": 3, "checkpoint_seconds": 1.0}
DEAF: Mapping[str, object] = {"ignore_sigterm": True}
BUSY: Mapping[str, object] = {"hang_at": 2}
CASES = (
    Case("queued", "pause"),
    Case("training", "cancel"),
    Case("paused", "cancel"),
    Case("saving", "pause", SAVING),
    Case("training", "pause"),
    Case("queued", "cancel"),
    Case("starting", "cancel", QUIET),
    Case("starting", "pause", QUIET),
    Case("saving", "cancel", SAVING),
    Case("deaf", "cancel", DEAF),
    Case("busy", "cancel", BUSY),
    Case("no database", "cancel"),
    Case("no database", "pause"),
)
LAST = (Case("deaf", "pause", DEAF, PAUSE_SECONDS), Case("busy", "pause", BUSY, PAUSE_SECONDS))
"""A minute each, so once."""


def stops(arena: Arena, cycles: int) -> Iterator[str]:
    """Each case in turn, with a pause of arbitrary length before the request."""
    last = LAST if cycles > len(CASES) else ()
    cases = [*itertools.islice(itertools.cycle(CASES), cycles - len(last)), *last]
    with ExitStack() as stack:
        stage = stack.enter_context(arena.stage(heartbeat_seconds=HEARTBEAT_SECONDS))
        fragile: tuple[Stage, FragileServers] | None = None
        for case in cases:
            if case.doing != "no database":
                yield from _stop(arena, case, stage, None)
                continue
            if fragile is None:
                fragile = stack.enter_context(arena.fragile_stage(heartbeat_seconds=HEARTBEAT_SECONDS))
            yield from _stop(arena, case, *fragile)


def _stop(arena: Arena, case: Case, stage: Stage, servers: FragileServers | None) -> Iterator[str]:
    job_id = stage.create_job(steps=LONG)
    supervisor: subprocess.Popen[bytes] | None = None
    if case.doing == "paused":
        stage.request(job_id, "pause")
    elif case.doing != "queued":
        supervisor = stage.supervisor(job_id, **case.options)
        _reach(stage, job_id, case)
    time.sleep(arena.random.uniform(0.0, 0.5))
    stage.request(job_id, case.action)
    began = time.monotonic()
    if servers is not None:
        servers.kill(servers.postgres)
        servers.postgres.start()
    wanted = {"cancel": "cancelled", "pause": "paused"}[case.action]
    try:
        stage.end(job_id, wanted, case.limit_seconds - (time.monotonic() - began))
    except AssertionError:
        yield f"{job_id}, {case}: {stage.job(job_id).status} after {case.limit_seconds} s"
    else:
        arena.recoveries.append(time.monotonic() - began)
        left = [start["pid"] for start in stage.trace(job_id) if alive(start["pid"])]
        if left:
            yield f"{job_id}, {case}: {wanted}, and the trainers {left} live on"
        if supervisor is not None and (status := supervisor.wait(20)) != 0:
            yield f"{job_id}, {case}: the supervisor ended with {status}"
        if stage.job(job_id).attempt > 1:
            yield f"{job_id}, {case}: {stage.job(job_id).attempt} attempts"
    finally:
        if supervisor is not None:
            supervisor.kill()
            supervisor.wait()


def _reach(stage: Stage, job_id: str, case: Case) -> None:
    """Wait until the job does what the case is about."""
    there: Callable[[], object]
    match case.doing:
        case "starting":
            there = lambda: stage.job(job_id).status == "running"  # noqa: E731  # one of four
        case "saving":
            there = lambda: [*stage.folder(job_id, attempt=1).glob("*.tmp")]  # noqa: E731
        case _:
            there = lambda: stage.job(job_id).step >= 2  # noqa: E731
    wait_for(f"a job that is {case.doing}", there)


STOP = (
    Fault(
        "stop",
        "cancel or pause whatever the job does; effective within 10 s, its trainer gone",
        "cancels and pauses",
        full=60,
        short=6,
        inflict=stops,
        guards=("desired",),
    ),
)
