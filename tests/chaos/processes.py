"""Faults of the processes that run a job: supervisor, worker, sweeper, and the messages that wake them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import psutil
from sqlalchemy import case, func, select, update

from service import database, queue, runs
from service.models import Job, JobEvent, Metric
from service.storage import Storage
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.oracles import finished, whole
from tests.integration.stage import CAP_BYTES, Stage, alive, gone_within, wait_for
from worker import sweeper

LONG = 100_000
"""Steps of a job that does not end by itself."""


def repeated_messages(arena: Arena, cycles: int) -> Iterator[str]:
    """Each job is announced five times, all of them mixed."""
    with arena.stage() as stage:
        ids = [stage.create_job(steps=2) for _ in range(cycles // 5)]
        messages = 5 * ids
        arena.random.shuffle(messages)
        app = queue.producer(stage.settings.redis_url)
        for job_id in messages:
            if not queue.wake(job_id, app):
                yield f"{job_id}: the broker did not take its message"
        worker = stage.worker(step_seconds=0.0)
        for job_id in ids:
            yield from finished(stage, job_id, arena.patience_seconds)
        wait_for("the end of all messages", lambda: stage.waiting_messages() == 0, arena.patience_seconds)
        worker.terminate()
        if worker.wait(arena.patience_seconds) != 0:
            yield f"the worker ended with {worker.returncode}"
        for job_id in ids:
            attempts, starts = stage.job(job_id).attempt, len(stage.trace(job_id))
            if (attempts, starts) != (1, 1):
                yield f"{job_id}: {attempts} attempts, {starts} trainers"


def killed_worker(arena: Arena, cycles: int) -> Iterator[str]:
    """SIGKILL to the worker, with three jobs on it, or to one supervisor; nobody but the kernel ends the trainers."""
    outlive = arena.guard == "lifeline"  # of the trainers' own; the supervisor's is taken out where it runs
    with arena.stage(lease_seconds=3.0, self_kill_seconds=2.5, worker_slots=3) as stage:
        stage.sweeper()
        worker = stage.worker(outlive=outlive)
        long = stage.create_job(steps=LONG)  # the others may all end at once, and then there would be nobody to kill
        ids = [long]
        try:
            for _ in range(cycles):
                while sum(stage.job(job_id).finished_at is None for job_id in ids) < 3:
                    ids.append(stage.create_job(steps=arena.random.randint(150, 400)))
                time.sleep(arena.random.random())
                victim = worker.pid if arena.random.random() < 0.7 else _supervisor(arena, stage, ids)
                hit = {job_id: pid for job_id, pid in _running(arena, stage, ids).items() if victim in _ancestors(pid)}
                began = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                if late := [pid for pid in hit.values() if not gone_within(pid, began + 2 - time.monotonic())]:
                    yield f"{len(late)} of {len(hit)} trainers live 2 s after their worker"
                if victim == worker.pid:
                    worker.wait()
                    worker = stage.worker(outlive=outlive)
                if hit:
                    arena.recoveries.append(seconds_until_running(arena, stage, hit, began))
            for job_id in ids[1:]:
                yield from finished(stage, job_id, arena.patience_seconds)
            stage.request(long, "pause")
            stage.end(long, "paused", arena.patience_seconds)
            yield from whole(stage, long)
        finally:
            for entry in [entry for job_id in ids for entry in stage.trace(job_id)]:
                if alive(entry["pid"]):
                    os.kill(entry["pid"], signal.SIGKILL)


def _running(arena: Arena, stage: Stage, ids: list[str]) -> dict[str, int]:
    """Pids of the trainers that run, by job, once there is one."""

    def found() -> dict[str, int]:
        latest = {job_id: int(traces[-1]["pid"]) for job_id in ids if (traces := stage.trace(job_id))}
        return {job_id: pid for job_id, pid in latest.items() if alive(pid) and stage.job(job_id).status == "running"}

    return wait_for("a trainer", found, arena.patience_seconds)


def _supervisor(arena: Arena, stage: Stage, ids: list[str]) -> int:
    def found() -> int | None:
        with suppress(psutil.NoSuchProcess):  # its job has just ended
            return int(psutil.Process(next(iter(_running(arena, stage, ids).values()))).ppid())
        return None

    return wait_for("a supervisor", found, arena.patience_seconds)


def _ancestors(pid: int) -> set[int]:
    with suppress(psutil.NoSuchProcess):
        return {parent.pid for parent in psutil.Process(pid).parents()}
    return set()


def seconds_until_running(arena: Arena, stage: Stage, ids: Iterable[str], began: float) -> float:
    """From `began` until all of these jobs have had another trainer, or their end."""

    def last_start() -> float | None:
        starts = [0.0]
        for job_id in ids:
            later = [entry["time"] for entry in stage.trace(job_id) if entry["time"] > began]
            if not later and stage.job(job_id).finished_at is None:
                return None
            starts += later[:1]
        return max(*starts, began + 0.001)

    return wait_for("another attempt", last_start, arena.patience_seconds) - began


def stopped_supervisor(arena: Arena, cycles: int) -> Iterator[str]:
    """SIGSTOP, and SIGCONT when it is too late: by its own clock, or because another has the job by now.

    Of each five, three lose their jobs at once, so that only the fence can tell them; one finds after three leases
    that nobody took its job, so that only its clock can; one loses it after three leases.
    """
    lease_seconds = 3.0  # any shorter, and a busy machine ends the runs that are to be stopped
    roomy = {"worker_slots": 16, "device_memory_bytes": 16 * CAP_BYTES}
    with arena.stage(lease_seconds=lease_seconds, self_kill_seconds=2.25, **roomy) as stage:
        kinds = ["taken", "late", "taken", "late and taken", "taken"] * -(-cycles // 5)
        for first in range(0, cycles, 5):
            yield from _stop_some(arena, stage, kinds[first : min(first + 5, cycles)], 3 * lease_seconds)


def _stop_some(arena: Arena, stage: Stage, kinds: list[str], seconds: float) -> Iterator[str]:
    ids = [stage.create_job(steps=LONG) for _ in kinds]
    supervisors = {}
    for job_id in ids:
        process = stage.supervisor(job_id)
        claimed = wait_for("a claim", lambda pid=process.pid: _claimed_by(stage, pid), arena.patience_seconds)  # type: ignore[misc]
        supervisors[claimed] = process
    kind_of = dict(zip(ids, arena.random.sample(kinds, len(kinds)), strict=True))
    for job_id in ids:
        stage.reach(job_id, 6, arena.patience_seconds)
    for process in supervisors.values():
        stage.stop_between_transactions(process.pid)
    stopped = time.monotonic()
    taken = [job_id for job_id in ids if kind_of[job_id] == "taken"]
    _take_over(stage, taken)
    for job_id in taken:
        os.kill(supervisors[job_id].pid, signal.SIGCONT)
    time.sleep(max(0.0, stopped + seconds - time.monotonic()))
    late = [job_id for job_id in ids if kind_of[job_id] == "late"]
    for job_id in late:
        os.kill(supervisors[job_id].pid, signal.SIGCONT)
    yield from _went_on(supervisors, late)
    both = [job_id for job_id in ids if kind_of[job_id] == "late and taken"]
    _take_over(stage, both)
    for job_id in both:
        os.kill(supervisors[job_id].pid, signal.SIGCONT)
    yield from _went_on(supervisors, [*taken, *both])
    for job_id in ids:
        if not gone_within(stage.trace(job_id)[0]["pid"], 2):
            yield f"{job_id}: {kind_of[job_id]}: its trainer went on"
        yield from _stale_effects(stage, job_id)
    _end(stage, ids)


def _went_on(supervisors: dict[str, subprocess.Popen[bytes]], ids: list[str]) -> Iterator[str]:
    for job_id in ids:
        if not gone_within(supervisors[job_id].pid, 10):
            yield f"{job_id}: its supervisor went on"
            supervisors[job_id].kill()
        supervisors[job_id].wait()


def _claimed_by(stage: Stage, pid: int) -> str | None:
    with database.transaction(stage.bind) as session:
        return session.scalar(select(Job.id).where(Job.worker.endswith(f":{pid}")))


def _take_over(stage: Stage, ids: list[str]) -> None:
    """Another attempt, that holds its lease and does nothing: whatever happens to the job now, the earlier one did.

    The leases of all others are made long: on a slow machine they have run out by now, and would be taken back too.
    """
    for job_id in ids:
        with database.transaction(stage.bind) as session:
            now = func.clock_timestamp()
            lease = case((Job.id == job_id, now - timedelta(seconds=1)), else_=now + timedelta(hours=1))
            session.execute(update(Job).where(Job.status == "running").values(lease_until=lease))
            runs.requeue_expired(session)
            assert runs.claim(session, job_id, "another", lease_seconds=600) is not None


def _stale_effects(stage: Stage, job_id: str) -> Iterator[str]:
    """What an attempt wrote or deleted after the next one was claimed."""
    job = stage.job(job_id)
    with database.transaction(stage.bind) as session:
        mine = (JobEvent.job_id == job_id, JobEvent.attempt == job.attempt)
        claim = select(func.min(JobEvent.id)).where(*mine, JobEvent.type == "started").scalar_subquery()
        earlier = (JobEvent.job_id == job_id, JobEvent.attempt < job.attempt)
        late = list(session.scalars(select(JobEvent.type).where(*earlier, JobEvent.id > claim)))
        fresh = (Metric.job_id == job_id, Metric.attempt < job.attempt, Metric.created_at > job.claimed_at)
        late += [f"step {step}" for step in session.scalars(select(Metric.step).where(*fresh))]
    if late:
        yield f"{job_id}: written by an attempt that had lost the job: {', '.join(late[:3])}"
    if job.attempt > 1 and job.status != "running":
        yield f"{job_id}: {job.status}, though its attempt still runs"
    yield from whole(stage, job_id)


def _end(stage: Stage, ids: list[str]) -> None:
    """Give the slots back, and leave no job that the next supervisor would take."""
    for job_id in ids:
        job = stage.job(job_id)
        if job.status == "running":
            with database.transaction(stage.bind) as session:
                runs.finish(session, job_id, job.attempt, "cancelled")
        else:
            stage.request(job_id, "cancel")


def sweepers_at_once(arena: Arena, cycles: int) -> Iterator[str]:
    """Four sweepers at the same moment; the work is done once, by one of them."""
    inside, most = 0, 0
    lock = threading.Lock()
    requeue = runs.requeue_expired

    def watched(session: object, **options: Any) -> list[str]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.02)
        try:
            return requeue(session, **options)  # type: ignore[arg-type]
        finally:
            with lock:
                inside -= 1

    with arena.stage() as stage, patch.object(runs, "requeue_expired", watched):
        app, storage = queue.producer(stage.settings.redis_url), Storage(stage.settings.data_dir)
        for _ in range(cycles):
            job_id = stage.create_job()
            with database.transaction(stage.bind) as session:
                runs.claim(session, job_id, "a worker that is gone", lease_seconds=0.0)
            requeued: list[str] = []
            threads = [
                threading.Thread(target=lambda found=requeued: found.extend(sweeper.sweep(stage.bind, app, storage)))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if most > 1:
                yield f"{most} sweepers worked at once"
                most = 0
            if requeued != [job_id]:
                yield f"taken back: {requeued} instead of {job_id}, once"
            stage.request(job_id, "cancel")


def crashing_job(arena: Arena, cycles: int) -> Iterator[str]:
    """A job that cannot be run ends after three attempts without progress, and says why."""
    for _ in range(cycles):
        with arena.stage() as stage:
            job_id = stage.create_job()
            for _ in range(5):
                if (job := stage.run(job_id, crash_at=3, step_seconds=0.0)).status != "queued":
                    break
            error = job.error or {}
            if (job.status, job.attempt, error.get("code")) != ("failed", 3, "attempts_exhausted"):
                yield f"{job.status} after {job.attempt} attempts: {error}"
            elif "SIGKILL" not in error["message"] or error["cause"]["code"] != "trainer_crashed":
                yield f"no cause: {error}"


PROCESSES = (
    Fault(
        "worker",
        "SIGKILL to the worker or a supervisor: trainers gone in 2 s, jobs finish, no two runs at once",
        "kills",
        full=200,
        short=3,
        inflict=killed_worker,
        guards=("lifeline",),
    ),
    Fault(
        "supervisor",
        "SIGSTOP until its lease is lost, then SIGCONT: it writes nothing and ends itself",
        "stops",
        full=100,
        short=4,
        inflict=stopped_supervisor,
        guards=("fence", "self-kill"),
    ),
    Fault(
        "message",
        "the same message five times: one attempt",
        "messages",
        full=1_000,
        short=40,
        inflict=repeated_messages,
        guards=("claim",),
    ),
    Fault(
        "sweeper",
        "four sweepers at once: one works, a lease is taken back once",
        "sweeps by four",
        full=100,
        short=10,
        inflict=sweepers_at_once,
        guards=("advisory lock",),
    ),
    Fault(
        "crash",
        "a job that always crashes: failed after three attempts, with the cause",
        "jobs",
        full=1,
        short=1,
        inflict=crashing_job,
        guards=("failures",),
    ),
)
