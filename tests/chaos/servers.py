"""Faults of the servers beneath: Redis wiped or gone, PostgreSQL restarted or gone, everything at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from starlette.testclient import TestClient

from api.app import create_app
from cli.embedded import EmbeddedServers
from service import queue
from service.storage import Storage
from tests.chaos.arena import Arena, FragileServers
from tests.chaos.fault import Fault
from tests.chaos.oracles import finished, whole
from tests.chaos.processes import LONG, seconds_until_running
from tests.integration.seed import add_dataset
from tests.integration.stage import Stage, gone_within, wait_for

SWEEP_SECONDS = 1.0
QUEUED_SECONDS = 30.0
"""How long a queued job may wait once the broker is back."""
POST_SECONDS = 1.0


def wiped_broker(arena: Arena, cycles: int) -> Iterator[str]:
    """FLUSHALL, or SIGKILL and a new start, while a job runs and others have just been announced."""
    with arena.fragile_stage(sweep_seconds=SWEEP_SECONDS, worker_slots=3) as (stage, servers):
        long = stage.create_job(steps=LONG)
        stage.sweeper()
        stage.worker()
        stage.reach(long, 1, arena.patience_seconds)
        app = queue.producer(stage.settings.redis_url)
        for _ in range(cycles):
            ids = [stage.create_job(steps=3) for _ in range(2)]
            for job_id in ids:
                queue.wake(job_id, app)
            time.sleep(0.02 * arena.random.random())
            began = time.monotonic()
            if arena.random.random() < 0.5:
                stage.redis.flushall()
            else:
                servers.kill(servers.redis)
                time.sleep(arena.random.random())
                servers.redis.start()
                began = time.monotonic()
            arena.recoveries.append(seconds_until_running(arena, stage, ids, began))
            if arena.recoveries[-1] > QUEUED_SECONDS:
                yield f"queued jobs waited for {arena.recoveries[-1]:.1f} s"
            for job_id in ids:
                yield from finished(stage, job_id, arena.patience_seconds)
            if (job := stage.job(long)).attempt != 1:
                yield f"the running job is at attempt {job.attempt}"
                break
        stage.request(long, "pause")
        stage.end(long, "paused", arena.patience_seconds)
        yield from whole(stage, long)


def dead_broker(arena: Arena, cycles: int) -> Iterator[str]:
    """POST /jobs while Redis is gone, or accepts and never answers: at once, and the job runs when it is back."""
    with arena.fragile_stage(sweep_seconds=SWEEP_SECONDS) as (stage, servers):
        body = job_body(stage)
        stage.sweeper()
        stage.worker(step_seconds=0.0)
        with TestClient(create_app(stage.settings), base_url="http://127.0.0.1") as client:
            for _ in range(cycles):
                hangs = arena.random.random() < 0.5
                if hangs:
                    servers.redis.children[0].process.send_signal(signal.SIGSTOP)
                else:
                    servers.kill(servers.redis)
                began = time.monotonic()
                answer = client.post("/jobs", json=body)
                seconds = time.monotonic() - began
                if answer.status_code != 202 or seconds > POST_SECONDS * arena.slack:
                    yield f"POST /jobs: {answer.status_code} after {seconds:.2f} s"
                back = time.monotonic()
                if hangs:
                    servers.redis.children[0].process.send_signal(signal.SIGCONT)
                else:
                    servers.redis.start()
                if answer.status_code == 202:
                    job_id = answer.json()["id"]
                    arena.recoveries.append(seconds_until_running(arena, stage, [job_id], back))
                    yield from finished(stage, job_id, arena.patience_seconds)


def job_body(stage: Stage) -> dict[str, Any]:
    dataset = add_dataset(stage.bind, Storage(stage.settings.data_dir))
    fields = {"model": "performer-tiny", "memory_cap": "512MiB", "sequence_length": 64, "batch_size": 1, "steps": 2}
    return {**fields, "dataset": dataset.id}


def restarted_database(arena: Arena, cycles: int) -> Iterator[str]:
    """PostgreSQL is killed or stopped, and is back within 30 s: the run goes on, and nothing that it said is lost."""
    defaults = {"lease_seconds": 90.0, "self_kill_seconds": 60.0, "heartbeat_seconds": 1.0}
    with arena.fragile_stage(**defaults) as (stage, servers):
        job_id = stage.create_job(steps=LONG)
        supervisor = stage.supervisor(job_id)
        for number in range(cycles):
            step = stage.reach(job_id, stage.job(job_id).step + 5, arena.patience_seconds).step
            time.sleep(arena.random.random())
            _kill_or_stop(arena, servers.postgres)
            time.sleep(20.0 if number % 25 == 24 else 2 * arena.random.random())
            servers.postgres.start()
            began = time.monotonic()
            stage.reach(job_id, step + 1, arena.patience_seconds)
            arena.recoveries.append(time.monotonic() - began)
            if (job := stage.job(job_id)).attempt != 1 or supervisor.poll() is not None:
                yield f"{job.status} at attempt {job.attempt}; supervisor: {supervisor.poll()}"
                return
        stage.request(job_id, "pause")
        stage.end(job_id, "paused", arena.patience_seconds)
        yield from whole(stage, job_id)


def lost_database(arena: Arena, cycles: int) -> Iterator[str]:
    """PostgreSQL is away for longer than a lease: the trainer is ended, and another attempt goes on from there."""
    with arena.fragile_stage(lease_seconds=3.0, self_kill_seconds=2.0) as (stage, servers):
        stage.sweeper()
        for _ in range(cycles):
            job_id = stage.create_job(steps=400)
            supervisor = stage.supervisor(job_id)
            stage.reach(job_id, 7, arena.patience_seconds)
            _kill_or_stop(arena, servers.postgres)
            if not gone_within(stage.trainer_pid(job_id), 2.0 + 3.0):
                yield f"{job_id}: its trainer lives 5 s after the database has gone"
            time.sleep(arena.random.random())
            servers.postgres.start()
            began = time.monotonic()
            if supervisor.wait(arena.patience_seconds) != 0:
                yield f"{job_id}: its supervisor ended with {supervisor.returncode}"
            stage.end(job_id, "queued", arena.patience_seconds)
            stage.supervisor(job_id)
            arena.recoveries.append(seconds_until_running(arena, stage, [job_id], began))
            if stage.trace(job_id)[-1]["step"] < 5:
                yield f"{job_id}: began anew"
            yield from finished(stage, job_id, arena.patience_seconds)


def _kill_or_stop(arena: Arena, server: EmbeddedServers) -> None:
    if arena.random.random() < 0.5:
        FragileServers.kill(server)
    else:
        server.stop()


def everything(arena: Arena, cycles: int) -> Iterator[str]:
    """SIGKILL to PostgreSQL, Redis, worker and sweeper at the same moment, jobs running and waiting."""
    with arena.fragile_stage(lease_seconds=3.0, self_kill_seconds=2.5, worker_slots=2) as (stage, servers):
        ids: list[str] = []
        processes = _start_both(stage)
        for _ in range(cycles):
            while len(open_ids := [job_id for job_id in ids if stage.job(job_id).finished_at is None]) < 3:
                ids.append(stage.create_job(steps=arena.random.randint(50, 300)))
            wait_for("a run", lambda: any(stage.job(i).status == "running" for i in ids), arena.patience_seconds)
            time.sleep(2 * arena.random.random())
            running = [job_id for job_id in open_ids if stage.job(job_id).status == "running"]
            _kill_all([*processes, *(child.process for child in _children(servers))])
            for server in (servers.postgres, servers.redis):
                servers.kill(server)
                server.start()
            processes = _start_both(stage)
            began = time.monotonic()
            arena.recoveries.append(seconds_until_running(arena, stage, running, began))
        for job_id in ids:
            yield from finished(stage, job_id, arena.patience_seconds)


def _start_both(stage: Stage) -> list[subprocess.Popen[bytes]]:
    return [stage.sweeper(), stage.worker()]


def _children(servers: FragileServers) -> list[Any]:
    both: tuple[EmbeddedServers, ...] = (servers.postgres, servers.redis)
    return [child for server in both for child in server.children]


def _kill_all(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


SERVERS = (
    Fault(
        "redis",
        "Redis wiped or restarted: running jobs untouched, queued ones start with the next sweep",
        "wipes",
        full=50,
        short=2,
        inflict=wiped_broker,
        guards=("repeated wakes",),
    ),
    Fault(
        "redis at POST",
        "Redis gone or silent at POST /jobs: an answer within 1 s, the job runs later",
        "submissions",
        full=20,
        short=2,
        inflict=dead_broker,
        guards=("publish deadline",),
    ),
    Fault(
        "postgres",
        "PostgreSQL killed or stopped, back within 30 s: no job ended, no gap in its metrics",
        "restarts",
        full=50,
        short=2,
        inflict=restarted_database,
        guards=("kept reports",),
    ),
    Fault(
        "outage",
        "PostgreSQL gone for longer than a lease: the trainer is ended, the job resumes",
        "outages",
        full=10,
        short=1,
        inflict=lost_database,
        guards=("self-kill",),
    ),
    Fault(
        "everything",
        "SIGKILL to PostgreSQL, Redis, worker and sweeper at once: all jobs resume and finish",
        "power cuts",
        full=20,
        short=1,
        inflict=everything,
        guards=("lease sweep",),
    ),
)
