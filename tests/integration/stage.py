"""What the tests of job execution share: a database with a job in it, a data folder, and processes to run the job."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import redis
from sqlalchemy import make_url, select

from service import calibrations, checkpoints, database, events, jobs, metrics, queue
from service.ids import new_id
from service.models import Checkpoint, Dataset, Job, Metric
from service.settings import Settings
from service.storage import attempt_dir, checkpoints_dir
from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning import MemoryBreakdown, Plan
from tests.integration.proxy import Proxy
from worker.device import announce, discover
from worker.slot import device_id
from worker.supervisor import supervise

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL = ModelConfig(num_layers=1, model_width=32, num_heads=2, mlp_width=64)
CAP_BYTES = 1 << 30
PLANTED = "planted-in-the-database-url"
"""A password that no process may write anywhere; PostgreSQL does not ask for one on its socket."""
DEVICE_BYTES = 8 * CAP_BYTES


def wait_for(what: str, condition: Callable[[], T | None], seconds: float = 15.0) -> T:
    """The first true value of `condition`. Fails, saying `what` was missing, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def a_plan(chunk_length: int) -> dict[str, Any]:
    breakdown = MemoryBreakdown(
        runtime=100, parameters=10, gradients=10, optimizer=20, states=1, activations=5, logits=2, workspace=1, safety=1
    )
    plan = Plan(
        chunk_length=chunk_length,
        num_chunks=64 // chunk_length,
        state_policy="keep",
        micro_batch_size=1,
        accumulation_steps=1,
        predicted_peak_bytes=breakdown.total,
        breakdown=breakdown,
        predicted_step_seconds=0.1,
        predicted_total_seconds=1.0,
        unchunked_peak_bytes=200,
        minimum_cap_bytes=120,
        max_sequence_length=0,
        check_chunk_length=None,
        reason="by hand",
        calibration_source="none",
        time_factor=1.0,
        frontier=(),
    )
    return {**plan.to_json(), "frontier": []}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


class Stage:
    """Quick heartbeats and sweeps; leases that last, as a busy machine must not end a run that a test wants to live."""

    def __init__(self, database_url: str, redis_url: str, data_dir: Path, **settings: Any) -> None:
        timing = {"lease_seconds": 30.0, "heartbeat_seconds": 0.3, "sweep_seconds": 0.3, "self_kill_seconds": 20.0}
        self.settings = Settings(
            database_url=database_url,
            redis_url=redis_url,
            data_dir=data_dir,
            trainer_threads=1,
            **{"device_memory_bytes": DEVICE_BYTES, **timing, **settings},
        )
        self.bind = database.engine(self.settings)
        self.device = device_id("cpu")
        assert announce(self.bind, discover(self.settings, drivers=()), "a test")
        self.redis = redis.Redis(unix_socket_path=redis_url.removeprefix("redis+socket://").split("?")[0])
        self.processes: list[subprocess.Popen[bytes]] = []
        self.overrides: dict[str, str] = {}
        """Of the environment of the processes that it starts."""
        self.logs = data_dir.parent / "logs"
        self.logs.mkdir(exist_ok=True)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.bind.dispose()
        self.redis.close()
        told = [log.name for log in self.logs.iterdir() if PLANTED.encode() in log.read_bytes()]
        assert told == [], "a password is in these logs"

    # Jobs

    def create_job(
        self,
        steps: int = 12,
        keep: int = 2,
        chunk_length: int = 64,
        memory_cap_bytes: int = CAP_BYTES,
        tenant: str = "default",
    ) -> str:
        train = TrainConfig(sequence_length=64, batch_size=1, steps=steps)
        dataset = Dataset(
            id=new_id("ds"), name="d", filename="d.txt", format="txt", bytes=3, documents=1, tokens=1_000,
            longest_document_tokens=1_000, sha256="0" * 64, problems=[],
        )  # fmt: skip
        with database.transaction(self.bind) as session:
            session.add(dataset)
            session.flush()
            job = jobs.create(
                session,
                spec={"name": "test", "model": "performer-tiny", "keep": keep, "metadata": {}},
                train=train.to_json(),
                model_config=MODEL.to_json(),
                plan=a_plan(chunk_length),
                memory_cap_bytes=memory_cap_bytes,
                dataset_id=dataset.id,
                tenant=tenant,
            )
        return job.id

    def job(self, job_id: str) -> Job:
        with database.transaction(self.bind) as session:
            return jobs.get(session, job_id)

    def request(self, job_id: str, action: Any) -> None:
        with database.transaction(self.bind) as session:
            jobs.request(session, job_id, action)

    def metrics(self, job_id: str) -> list[Metric]:
        with database.transaction(self.bind) as session:
            return metrics.page(session, job_id, limit=100_000)[0]

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with database.transaction(self.bind) as session:
            return checkpoints.page(session, job_id)

    def events(self, job_id: str, kind: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        with database.transaction(self.bind) as session:
            rows = events.page(session, job_id, limit=1_000)[0]
        return [(row.type, row.data) for row in rows if kind in (None, row.type)]

    def calibration(self) -> dict[str, Any] | None:
        with database.transaction(self.bind) as session:
            return calibrations.current(session)

    def reach(self, job_id: str, step: int, seconds: float = 15.0) -> Job:
        """Wait until the database knows of `step`."""

        def reached() -> Job | None:
            job = self.job(job_id)
            return job if job.step >= step else None

        return wait_for(f"step {step}", reached, seconds)

    def end(self, job_id: str, status: str, seconds: float = 15.0) -> Job:
        def ended() -> Job | None:
            job = self.job(job_id)
            return job if job.status == status else None

        return wait_for(f"status {status}", ended, seconds)

    # Files

    def folder(self, job_id: str, attempt: int | None = None) -> Path:
        """Of the checkpoints of a job, or of one attempt at it."""
        path = checkpoints_dir(job_id) if attempt is None else attempt_dir(job_id, attempt)
        return self.settings.data_dir / path

    def trace(self, job_id: str, event: str = "start") -> list[dict[str, Any]]:
        """What the fake trainers wrote down about themselves."""
        path = self.folder(job_id).parent / "trace.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def trainer_pid(self, job_id: str, attempt: int = 1) -> int:
        found = wait_for("a trainer", lambda: [t for t in self.trace(job_id) if t["attempt"] == attempt])
        return int(found[0]["pid"])

    # Processes

    @property
    def environment(self) -> dict[str, str]:
        names = (
            "lease_seconds", "heartbeat_seconds", "sweep_seconds", "self_kill_seconds", "data_dir", "worker_slots",
            "device_memory_bytes", "patience_seconds",
        )  # fmt: skip
        return os.environ | {
            "DATABASE_URL": make_url(self.settings.database_url)
            .set(password=PLANTED)
            .render_as_string(hide_password=False),
            "REDIS_URL": self.settings.redis_url,
            "SLIMTUNE_TRAINER_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **{f"SLIMTUNE_{name.upper()}": str(getattr(self.settings, name)) for name in names},
            **self.overrides,
        }

    def run(self, job_id: str, **options: Any) -> Job:
        """One attempt, in this process."""
        command = [sys.executable, str(HERE / "fake_trainer.py"), json.dumps(options)]
        supervise(job_id, self.settings, command=command, device_wait_seconds=0.2)
        return self.job(job_id)

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}-{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment | environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def supervisor(self, job_id: str, **options: Any) -> subprocess.Popen[bytes]:
        """One attempt, in a process of its own."""
        script = str(HERE / "run_supervisor.py")
        return self.start("supervisor", [sys.executable, script, job_id, json.dumps(options)])

    def worker(self, application: str = "tests.integration.fake_worker", **options: Any) -> subprocess.Popen[bytes]:
        """A Celery worker, by default with fake trainers of these options."""
        command = [sys.executable, "-m", "celery", "--quiet", "-A", application, "worker", "--loglevel=INFO"]
        command += ["--without-mingle", "--without-gossip"]  # a second of looking for other workers
        return self.start("worker", command, FAKE_TRAINER_OPTIONS=json.dumps(options))

    def sweeper(self) -> subprocess.Popen[bytes]:
        return self.start("sweeper", [sys.executable, "-m", "tests.chaos.sweeper"])

    def stop_between_transactions(self, pid: int) -> None:
        """SIGSTOP at a moment when the process holds no row lock: with one, nobody gets at its job for a minute."""
        query = select(Job.id).where(Job.worker.endswith(f":{pid}")).with_for_update(skip_locked=True)

        def stopped() -> bool:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)
            with database.transaction(self.bind) as session:
                if session.scalar(query) is not None:
                    return True
            os.kill(pid, signal.SIGCONT)
            return False

        wait_for("a moment without a lock", stopped)

    def waiting_messages(self) -> int:
        return int(self.redis.llen(queue.QUEUE))


@contextlib.contextmanager
def open_stage(database_url: str, redis_url: str, folder: Path, **settings: Any) -> Iterator[Stage]:
    data_dir = folder / "data"
    data_dir.mkdir()
    stage = Stage(database_url, redis_url, data_dir, **settings)
    try:
        yield stage
    finally:
        stage.close()


class DatabaseProxy(Proxy):
    """In front of PostgreSQL, on a unix socket."""

    def __init__(self, database_url: str, folder: Path) -> None:
        url = make_url(database_url)
        target = f"{url.query['host']}/.s.PGSQL.5432"
        self.url = url.set(query={"host": str(folder)}).render_as_string(hide_password=False)

        def connect() -> socket.socket:
            server = socket.socket(socket.AF_UNIX)
            server.connect(target)
            return server

        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / ".s.PGSQL.5432"))
        listener.listen(16)
        super().__init__(listener, connect)
