"""What the load meets: `slimtune up` as a process in a folder of its own, and a database full of jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil
import psycopg
import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from benchmarks.bench_measure import ROOT, Record
from cli.client import Client, Job

CORES = 2
CURVE_STEPS = 200
JOBS_WITH_A_CURVE = 1_000
ROLES = {
    "uvicorn": "API",
    "postgres": "PostgreSQL",
    "redis": "Redis",
    "worker.start": "trainer",
    "celery": "worker",
    "worker.sweeper": "sweeper",
}
"""Words in command lines, and whose they are; PostgreSQL's sessions and the pool's processes are told by parents."""

CURVE = """
INSERT INTO metrics (job_id, step, attempt, loss, learning_rate, grad_norm, step_seconds, tokens, peak_bytes)
SELECT id, n, 1, 2 + 3 * exp(-n / 1e5) + random() / 10, 0.001, 1 + random(), 0.2 + random() / 20, 4096::bigint * n,
    300000000
FROM unnest(%s::text[]) AS id, generate_series(1, %s) AS n
"""
EVENTS = """
INSERT INTO job_events (job_id, attempt, type, data)
SELECT id, log.attempt, coalesce(log.type, status), log.data::jsonb
FROM jobs, (VALUES
    (1, 0, 'queued', '{}'),
    (2, 0, 'planned', '{"chunk_length": 1024, "num_chunks": 4, "state_policy": "keep", "reason": "the fastest"}'),
    (3, 1, 'started', '{"step": 0, "worker": "celery@host"}'),
    (4, 1, 'evaluation', '{"step": 100, "validation_loss": 2.9}'),
    (5, 1, 'checkpoint', '{"step": 100, "bytes": 10000000}'),
    (6, 1, NULL, '{}')) AS log (number, attempt, type, data)
WHERE jobs.name = 'of the crowd'
ORDER BY id, log.number
"""


@dataclass(frozen=True)
class Service:
    """A running `slimtune up`."""

    process: psutil.Process
    url: str
    home: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def engine(self) -> Engine:
        """On its database."""
        return sqlalchemy.create_engine(f"postgresql+psycopg://slimtune@/slimtune?host={self._sockets}")

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """To its database, autocommitting."""
        return psycopg.connect(host=str(self._sockets), user="slimtune", dbname="slimtune", autocommit=True)

    def api(self) -> psutil.Process:
        """Its API."""
        return next(child for child in self.process.children(recursive=True) if "uvicorn" in child.cmdline())

    @property
    def _sockets(self) -> Path:
        return self.home / "servers" / "sockets"

    def cpu_seconds(self) -> dict[str, float]:
        """What its processes have used so far, by role."""
        used = dict.fromkeys(ROLES.values(), 0.0)
        roles: dict[int, str | None] = {}
        for child in self.process.children(recursive=True):  # parents before their children
            try:
                line, times, parent = " ".join(child.cmdline()), child.cpu_times(), child.ppid()
            except psutil.NoSuchProcess:
                continue
            # A trainer is a child of the worker's, and in PostgreSQL's command line are names of folders.
            role = next((name for word, name in ROLES.items() if word in line), roles.get(parent))
            roles[child.pid] = role
            if role is not None:
                # Sessions of PostgreSQL end when a pool has enough of them: the server has then waited for them.
                used[role] += times.user + times.system + times.children_user + times.children_system
        return used


@contextmanager
def running_service(home: Path, settings: Mapping[str, str] | None = None) -> Iterator[Service]:
    """The service, and whoever asks it from this process, on two cores. RuntimeError if it does not start.

    `settings` are variables of its environment.
    """
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:CORES])
    ours = ("DATABASE_URL", "REDIS_URL", "SLIMTUNE_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["SLIMTUNE_TRAINER_THREADS"] = str(min(CORES, len(allowed)))
    environment |= settings or {}
    command = [sys.executable, "-m", "cli.main", "up", "--home", str(home), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield Service(psutil.Process(process.pid), _ready(process), home)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
        os.sched_setaffinity(0, allowed)


def _ready(process: subprocess.Popen[str]) -> str:
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if found := re.search(r"ready: (http://\S+)", line):
            return found[1]
    raise RuntimeError(f"slimtune up did not start:\n{said}")


def text_file(folder: Path) -> Path:
    """Something to train on."""
    path = folder / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    return path


def upload(client: Client, folder: Path) -> str:
    """A dataset's id."""
    return client.datasets.upload(text_file(folder))["id"]


@dataclass(frozen=True)
class Crowd:
    """The ids of the jobs that were put into the table."""

    jobs: list[str]
    with_curve: list[str]
    long: str
    """The one with the longest curve."""
    last_event: int


def crowd(connection: psycopg.Connection[tuple[Any, ...]], template: str, jobs: int, long_steps: int) -> Crowd:
    """Copies of the job `template`, one for each minute before it: with their log, some with a curve, one with
    `long_steps` of it. What a job says of its run differs; the other columns, whatever they are, are the template's.
    """
    run = {
        "id": "'job_' || replace(uuidv7(make_interval(mins => n - %(jobs)s - 1))::text, '-', '')",
        "name": "'of the crowd'",
        "created_at": "now() + make_interval(mins => n - %(jobs)s - 1)",
        "started_at": "now() + make_interval(mins => n - %(jobs)s - 1)",
        "finished_at": "CASE WHEN n %% 10 = 9 THEN NULL ELSE now() + make_interval(mins => n - %(jobs)s) END",
        "status": "CASE n %% 10 WHEN 7 THEN 'failed' WHEN 8 THEN 'cancelled' WHEN 9 THEN 'paused' ELSE 'succeeded' END",
        "desired": "CASE n %% 10 WHEN 8 THEN 'cancel' WHEN 9 THEN 'pause' ELSE 'run' END",
        "error": "CASE n %% 10 WHEN 7 THEN jsonb_build_object('code', 'diverged', 'message', 'the loss is not finite', "
        "'step', 120, 'hint', 'lower the learning rate') END",
        "attempt": "1",
        "step": "CASE WHEN n %% 10 < 7 THEN 200 ELSE 120 END",
        "total_steps": "200",
        "tokens": "4096 * 200",
        "loss": "2.3",
        "step_seconds": "0.2",
        "typical_step_seconds": "0.2",
        "probed_peak_bytes": "predicted_peak_bytes - 2000000",
        "measured_peak_bytes": "predicted_peak_bytes - 1000000",
    }
    rows = connection.execute("SELECT column_name FROM information_schema.columns WHERE table_name = 'jobs'").fetchall()
    unset = {"lease_until", "worker", "blocked_since"}
    columns = {name: run.get(name, f'jobs."{name}"') for (name,) in rows if name not in unset}
    names, values = ", ".join(f'"{name}"' for name in columns), ", ".join(columns.values())
    ids = connection.execute(
        f"INSERT INTO jobs ({names}) SELECT {values} FROM jobs, generate_series(1, %(jobs)s) AS n "  # noqa: S608
        "WHERE jobs.id = %(template)s RETURNING id",
        {"jobs": jobs, "template": template},
    ).fetchall()
    connection.execute(EVENTS)
    everyone = sorted(identifier for (identifier,) in ids)
    with_curve = everyone[:: max(jobs // JOBS_WITH_A_CURVE, 1)]
    long = with_curve.pop(len(with_curve) // 2)
    connection.execute(CURVE, (with_curve, CURVE_STEPS))
    connection.execute(CURVE, ([long], long_steps))
    for statement in ("VACUUM ANALYZE", "CHECKPOINT"):  # which the server would do by itself within minutes
        connection.execute(statement)
    last_event = connection.execute("SELECT max(id) FROM job_events").fetchone()
    assert last_event is not None
    return Crowd(everyone, with_curve, long, last_event[0])


def explained(session: Session, call: Callable[[Session], object]) -> Record:
    """EXPLAIN (ANALYZE, FORMAT JSON) of the last statement of `call`, with its parameters."""
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    connection = session.connection()
    event.listen(connection, "before_cursor_execute", note)
    call(session)
    event.remove(connection, "before_cursor_execute", note)
    statement, parameters = statements[-1]
    answer = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
    plan: Record = answer.scalar_one()[0]
    return plan


def nodes(plan: Record) -> Iterator[Record]:
    """The nodes of a plan of EXPLAIN, from the root on."""
    node = plan.get("Plan", plan)
    yield node
    for child in node.get("Plans", []):
        yield from nodes(child)


def reached(job: Job, step: int, seconds: float = 120.0) -> None:
    """Wait until the running job is there. RuntimeError if it ends before, WaitTimeoutError if it takes too long."""
    for _ in job.follow(0.2, metrics=False, timeout_seconds=seconds):
        if job.progress["step"] >= step:
            return
    raise RuntimeError(f"{job.id} is {job.status} at step {job.progress['step']}: {job.error}")
