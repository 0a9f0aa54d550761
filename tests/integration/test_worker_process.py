"""Real Celery workers on a real broker: messages, shutdown, and kill -9 at every level."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from service import calibrations, database, queue
from service.models import CalibrationRecord
from service.settings import Settings
from slim_core.planning import Calibration, default_calibration
from tests.integration.fake_trainer import loss_at
from tests.integration.stage import ROOT, Stage, alive, open_stage, parent_of, wait_for
from worker.calibrator import CalibrationError, calibrate, measure

LONG = 100_000


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def wake(stage: Stage, job_id: str) -> None:
    assert queue.wake(job_id, queue.producer(stage.settings.redis_url))


def all_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_messages_run_jobs_once_and_an_idle_worker_stops(stage: Stage) -> None:
    jobs = [stage.create_job(steps=12), stage.create_job(steps=12)]
    worker = stage.worker(crash_at=7, crash_attempts=1)
    for job_id in jobs:
        for _ in range(5):
            wake(stage, job_id)
    for job_id in jobs:
        assert stage.end(job_id, "succeeded", seconds=30).attempt == 2
        assert [start["step"] for start in stage.trace(job_id)] == [0, 5]
    wait_for("the end of the queue", lambda: stage.waiting_messages() == 0)
    worker.terminate()
    assert worker.wait(10) == 0
    assert [stage.job(job_id).attempt for job_id in jobs] == [2, 2]


def test_a_warm_shutdown_ends_at_a_checkpoint_from_which_the_job_goes_on(stage: Stage) -> None:
    job_id = stage.create_job(steps=500)
    worker = stage.worker(checkpoint_every=10_000)
    wake(stage, job_id)
    stage.reach(job_id, 3)
    worker.terminate()
    assert worker.wait(10) == 0
    job = stage.job(job_id)
    assert (job.status, job.failures) == ("queued", 0)
    stopped_at = job.step
    assert [row.step for row in stage.checkpoints(job_id)] == [stopped_at]
    assert stage.waiting_messages() == 1

    job = stage.run(job_id, checkpoint_every=10_000, step_seconds=0)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert [start["step"] for start in stage.trace(job_id)] == [0, stopped_at]
    assert [row.loss for row in stage.metrics(job_id)] == [loss_at(step) for step in range(1, 501)]


@pytest.mark.parametrize("victim", ["worker", "pool process"])
def test_kill_9_takes_the_trainer_along_and_loses_no_job(stage: Stage, victim: str) -> None:
    stage.overrides |= {"SLIMTUNE_LEASE_SECONDS": "3", "SLIMTUNE_SELF_KILL_SECONDS": "2.5"}
    job_id = stage.create_job(steps=LONG)
    worker = stage.worker()
    wake(stage, job_id)
    stage.reach(job_id, 7)
    trainer = stage.trainer_pid(job_id)
    supervisor = parent_of(trainer)
    assert parent_of(supervisor) == worker.pid
    if victim == "worker":
        worker.kill()
        worker.wait()
        assert all_gone([supervisor, trainer], 2)
        stage.worker()
    else:
        os.kill(supervisor, signal.SIGKILL)
        assert all_gone([supervisor, trainer], 2)

    stage.start("sweeper", [sys.executable, "-m", "worker.sweeper"])
    resumed = wait_for("the second attempt", lambda: stage.trace(job_id)[1:], 30)
    assert resumed[0]["step"] >= 5
    assert resumed[0]["attempt"] == 2
    stage.request(job_id, "cancel")
    stage.end(job_id, "cancelled")
    assert len(stage.trace(job_id)) == 2


def test_the_celery_process_is_free_of_torch(stage: Stage) -> None:
    program = "import sys, worker.app, worker.tasks, worker.sweeper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=stage.environment, cwd=ROOT, check=False).returncode == 0


CALIBRATION = replace(default_calibration(), source="measured by a test", runtime_bytes=200_000_000)


def test_a_calibration_is_measured_and_stored(stage: Stage) -> None:
    program = f"import json; print('noise'); print(json.dumps({CALIBRATION.to_json()!r}))"
    measured = calibrate(stage.bind, stage.settings, "w", [sys.executable, "-c", program])
    assert measured is not None
    assert replace(measured, machine="") == CALIBRATION
    stored = stage.calibration()
    assert stored is not None
    assert Calibration.from_json(stored) == measured


def test_a_worker_that_starts_again_uses_what_was_measured(stage: Stage) -> None:
    """Until it is a day old, another number of threads is wanted, or another machine has measured itself."""

    def measures(settings: Settings) -> bool:
        source = f"measurement {next(numbers)}"
        program = f"import json; print(json.dumps({replace(CALIBRATION, source=source).to_json()!r}))"
        calibration = calibrate(stage.bind, settings, "w", [sys.executable, "-c", program])
        assert calibration is not None
        assert replace(calibration, machine="") == replace(CALIBRATION, source=calibration.source)
        return calibration.source == source

    numbers = itertools.count()
    more_threads = stage.settings.model_copy(update={"trainer_threads": stage.settings.trainer_threads + 1})
    assert [measures(stage.settings) for _ in range(3)] == [True, False, False]
    assert measures(stage.settings.model_copy(update={"calibration_seconds": 0.0}))
    assert measures(more_threads)
    assert measures(stage.settings)
    with database.transaction(stage.bind) as session:
        calibrations.store(session, "cpu", "another", replace(CALIBRATION, machine="another").to_json())
    assert measures(stage.settings)
    with database.transaction(stage.bind) as session:
        session.execute(update(CalibrationRecord).values(created_at=func.now() - timedelta(days=1)))
    assert measures(stage.settings)
    with database.transaction(stage.bind) as session:  # of a release that measured something else
        for record in session.scalars(select(CalibrationRecord)):
            record.data = {name: value for name, value in record.data.items() if name != "float32"}
    assert measures(stage.settings)


def test_a_calibration_that_fails_is_no_obstacle(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such device')"]
    assert calibrate(stage.bind, stage.settings, "w", command) is None
    assert "no such device" in caplog.text
    assert stage.calibration() is None
    for program in ("print('not json')", "print('{}')", "", "print('[1]')"):
        with pytest.raises(CalibrationError):
            measure(1, [sys.executable, "-c", program])


def test_a_machine_without_the_heap_is_told_so(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.environment.library_path", lambda: None)
    program = f"import json; print(json.dumps({CALIBRATION.to_json()!r}))"
    assert measure(1, [sys.executable, "-c", program]) == CALIBRATION
    assert "install a C compiler" in caplog.text


def test_jobs_run_at_once_in_one_worker_which_drains_them_all(stage: Stage) -> None:
    """Three of four slots are busy when the worker is told to stop: each ends at a checkpoint, none is a failure."""
    jobs = [stage.create_job(steps=LONG) for _ in range(3)]
    worker = stage.worker(checkpoint_every=10_000)
    wake(stage, jobs[0])  # one message: whoever starts a job has the next one looked for
    for job_id in jobs:
        stage.reach(job_id, 2)
    worker.terminate()
    assert worker.wait(20) == 0
    for job_id in jobs:
        job = stage.job(job_id)
        assert (job.status, job.failures, job.attempt) == ("queued", 0, 1)
        assert [row.step for row in stage.checkpoints(job_id)] == [job.step]
