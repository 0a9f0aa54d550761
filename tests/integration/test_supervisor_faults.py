"""The supervisor as a process of its own: told to stop, killed, fenced off, cut off from its database.

The oracle is the trace that the fake trainers write, beside the database: it says what really ran. Each of these was
seen to fail without what it is about: the fenced supervisor without the comparison of attempts in
`service.runs._fence`, the one stopped for three leases without the checks of `Lease.lost`, the database that hangs
without the watchdog.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update

from service import database, runs
from service.models import Job
from service.settings import Settings
from tests.integration.fake_trainer import loss_at
from tests.integration.stage import DatabaseProxy, Stage, alive, gone_within, open_stage, wait_for
from worker.attempt import CANCEL_SECONDS, POLL_SECONDS
from worker.resume import damage

LONG = 100_000
"""Steps of a job that does not end by itself."""


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


@pytest.fixture
def sockets() -> Iterator[Path]:
    # Not tmp_path: the path of a socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slimtune-proxy-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def proxied(database_url: str, redis_url: str, tmp_path: Path, sockets: Path) -> Iterator[tuple[Stage, DatabaseProxy]]:
    """A stage of its own on the real database; only the supervisors that it starts go through the proxy."""
    proxy = DatabaseProxy(database_url, sockets)
    with open_stage(database_url, redis_url, tmp_path) as stage:
        stage.overrides["DATABASE_URL"] = proxy.url
        yield stage, proxy
    proxy.close()


def test_cancel_does_not_wait_for_a_trainer_that_ignores_it(stage: Stage) -> None:
    job_id = stage.create_job(steps=LONG)
    supervisor = stage.supervisor(job_id, ignore_sigterm=True)
    trainer = stage.trainer_pid(job_id)
    stage.request(job_id, "cancel")
    began = time.monotonic()
    stage.end(job_id, "cancelled", seconds=10)
    assert time.monotonic() - began < 8
    assert supervisor.wait(5) == 0
    assert not alive(trainer)
    assert stage.waiting_messages() == 0


def test_a_cancel_is_effective_within_ten_seconds_with_the_default_heartbeat() -> None:
    """What a silent trainer takes that does not end: a heartbeat until it is told, the grace, a look at the clock after
    each, and the last write. `make chaos` times real ones."""
    heartbeat = Settings.model_fields["heartbeat_seconds"].default
    assert heartbeat + CANCEL_SECONDS + 2 * POLL_SECONDS <= 9


def test_pause_keeps_the_step_and_resume_goes_on_from_it(stage: Stage) -> None:
    job_id = stage.create_job(steps=400)
    supervisor = stage.supervisor(job_id, checkpoint_every=1_000)
    stage.reach(job_id, 3)
    stage.request(job_id, "pause")
    paused = stage.end(job_id, "paused")
    assert supervisor.wait(5) == 0
    assert [row.step for row in stage.checkpoints(job_id)] == [paused.step]
    assert stage.events(job_id, "stopping") == [("stopping", {"reason": "pause"})]

    stage.request(job_id, "resume")
    job = stage.run(job_id, checkpoint_every=1_000, step_seconds=0)
    assert job.status == "succeeded", job.error
    assert [start["step"] for start in stage.trace(job_id)] == [0, paused.step]
    assert [row.loss for row in stage.metrics(job_id)] == [loss_at(step) for step in range(1, 401)]


def test_sigterm_gives_the_job_back_with_a_checkpoint(stage: Stage) -> None:
    job_id = stage.create_job(steps=LONG)
    supervisor = stage.supervisor(job_id, checkpoint_every=1_000)
    stage.reach(job_id, 3)
    supervisor.terminate()
    assert supervisor.wait(5) == 0
    job = stage.job(job_id)
    assert (job.status, job.failures, job.desired) == ("queued", 0, "run")
    assert [row.step for row in stage.checkpoints(job_id)] == [job.step]
    assert stage.waiting_messages() == 1


def test_the_trainer_dies_with_its_supervisor(stage: Stage) -> None:
    job_id = stage.create_job(steps=LONG)
    supervisor = stage.supervisor(job_id, hang_at=2)
    trainer = stage.trainer_pid(job_id)
    stage.reach(job_id, 2)
    # It holds the device's lock itself: should it outlive its supervisor, the next one still cannot start.
    assert any("/locks/cpu-" in str(entry.readlink()) for entry in Path(f"/proc/{trainer}/fd").iterdir())
    supervisor.kill()
    assert gone_within(trainer, 2)
    supervisor.wait()
    job = stage.job(job_id)
    assert (job.status, job.attempt) == ("running", 1)  # until its lease runs out


def test_a_supervisor_without_parent_stops(stage: Stage, tmp_path: Path) -> None:
    job_id = stage.create_job(steps=LONG)
    script = str(Path(__file__).with_name("run_supervisor.py"))
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[2:])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", program, str(pid_file), sys.executable, script, job_id, '{"ignore_sigterm": true}']
    parent = stage.start("parent", command)
    trainer = stage.trainer_pid(job_id)
    supervisor = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    assert gone_within(trainer, 2)
    assert gone_within(supervisor, 3)
    job = stage.job(job_id)
    assert (job.status, job.failures) == ("queued", 0)


def test_a_fenced_supervisor_writes_and_deletes_nothing(stage: Stage) -> None:
    job_id = stage.create_job(steps=LONG)
    supervisor = stage.supervisor(job_id)
    trainer = stage.trainer_pid(job_id)
    stage.reach(job_id, 12)
    stage.stop_between_transactions(supervisor.pid)
    # Sooner than its own clock ends the run, so that it is the fence that does.
    with database.transaction(stage.bind) as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=func.now() - timedelta(seconds=1)))
    with database.transaction(stage.bind) as session:
        assert runs.requeue_expired(session) == [job_id]
        assert runs.claim(session, job_id, "another", lease_seconds=60) is not None
    new = stage.folder(job_id, attempt=2) / "step-99999999.tmp"
    new.mkdir(parents=True)
    before = (stage.events(job_id), [row.step for row in stage.metrics(job_id)], stage.job(job_id).lease_until)
    registered = {row.path for row in stage.checkpoints(job_id)}
    os.kill(supervisor.pid, signal.SIGCONT)
    assert supervisor.wait(5) == 0

    assert not alive(trainer)
    assert (stage.events(job_id), [row.step for row in stage.metrics(job_id)], stage.job(job_id).lease_until) == before
    assert (stage.job(job_id).status, stage.job(job_id).attempt) == ("running", 2)
    assert all((stage.settings.data_dir / path / "state.json").exists() for path in registered)
    assert new.exists()
    assert stage.waiting_messages() == 0


def test_a_trainer_that_outlives_its_attempt_touches_no_checkpoint_of_the_next(stage: Stage) -> None:
    """As on a machine that is cut off: it goes on, and nobody is there to end it."""
    job_id = stage.create_job(steps=40)
    supervisor = stage.supervisor(job_id)
    trainer = stage.trainer_pid(job_id)
    stage.reach(job_id, 12)
    stage.stop_between_transactions(supervisor.pid)
    os.kill(trainer, signal.SIGSTOP)
    with database.transaction(stage.bind) as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=func.now() - timedelta(seconds=1)))
    expire(stage, job_id)
    job = stage.run(job_id, step_seconds=0)
    assert (job.status, job.attempt) == ("succeeded", 2)
    registered = stage.checkpoints(job_id)

    os.kill(trainer, signal.SIGCONT)
    last = stage.folder(job_id, attempt=1) / "step-00000040"
    wait_for("the stale trainer's checkpoint of the same step", last.exists)
    assert [row.step for row in registered] == [40, 35]
    for row in registered:
        assert damage(stage.settings.data_dir / row.path, row.files, lambda: None) is None
    os.kill(supervisor.pid, signal.SIGCONT)
    assert supervisor.wait(5) == 0


def test_a_supervisor_stopped_for_three_leases_kills_itself(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with open_stage(database_url, redis_url, tmp_path, lease_seconds=0.8, self_kill_seconds=0.6) as stage:
        job_id = stage.create_job(steps=LONG)
        supervisor = stage.supervisor(job_id)
        trainer = stage.trainer_pid(job_id)
        stage.reach(job_id, 3)
        os.kill(supervisor.pid, signal.SIGSTOP)
        time.sleep(2.4)
        os.kill(supervisor.pid, signal.SIGCONT)
        assert supervisor.wait(5) == 0
        assert not alive(trainer)
        # Nobody took the job meanwhile, so it was the clock and not the fence that ended the run.
        assert (stage.job(job_id).status, stage.job(job_id).attempt) == ("running", 1)
        assert stage.events(job_id, "stopping") == []


def test_supervisors_of_the_same_job_make_one_attempt(stage: Stage) -> None:
    job_id = stage.create_job(steps=20)
    supervisors = [stage.supervisor(job_id, step_seconds=0.02) for _ in range(3)]
    assert [supervisor.wait(20) for supervisor in supervisors] == [0] * 3
    job = stage.job(job_id)
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert len(stage.trace(job_id)) == 1


def test_a_database_restart_costs_nothing(proxied: tuple[Stage, DatabaseProxy]) -> None:
    stage, proxy = proxied
    job_id = stage.create_job(steps=120, keep=1_000)
    supervisor = stage.supervisor(job_id, checkpoint_every=20)
    stage.reach(job_id, 30)
    proxy.refuse()
    time.sleep(0.8)
    assert alive(stage.trainer_pid(job_id))
    proxy.answer()
    job = stage.end(job_id, "succeeded")
    assert supervisor.wait(5) == 0
    assert job.attempt == 1
    assert [row.step for row in stage.metrics(job_id)] == list(range(1, 121))
    assert [row.step for row in stage.checkpoints(job_id)] == list(range(120, 0, -20))


@pytest.mark.parametrize("how", ["refuse", "hang"])
def test_a_database_gone_for_longer_ends_the_run(proxied: tuple[Stage, DatabaseProxy], how: str) -> None:
    self_kill_seconds = 2.0
    stage, proxy = proxied
    stage.overrides |= {"SLIMTUNE_LEASE_SECONDS": "2.5", "SLIMTUNE_SELF_KILL_SECONDS": str(self_kill_seconds)}
    job_id = stage.create_job(steps=LONG)
    supervisor = stage.supervisor(job_id)
    trainer = stage.trainer_pid(job_id)
    stage.reach(job_id, 7)
    getattr(proxy, how)()
    assert not gone_within(trainer, self_kill_seconds / 2)
    assert gone_within(trainer, self_kill_seconds + 1)
    time.sleep(0.5)
    proxy.answer()
    assert supervisor.wait(10) == 0
    assert stage.job(job_id).status == "running"
    if how == "hang":
        return
    expire(stage, job_id)
    newest = stage.checkpoints(job_id)[0].step
    resumed = stage.supervisor(job_id)
    stage.trainer_pid(job_id, attempt=2)
    resumed.terminate()
    assert resumed.wait(5) == 0
    assert [start["step"] for start in stage.trace(job_id)] == [0, newest]


def expire(stage: Stage, job_id: str) -> None:
    """Let the lease run out and the job be queued again, as the sweeper does."""

    def requeued() -> bool:
        with database.transaction(stage.bind) as session:
            return job_id in runs.requeue_expired(session)

    wait_for("an expired lease", requeued)
