"""The sweeper: expired leases, lost messages, one at a time, and its own end."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, update

from service import database, queue, runs
from service.models import Job
from service.storage import Storage
from tests.integration.stage import DatabaseProxy, Stage, open_stage, wait_for
from worker import sweeper

SWEEPER = [sys.executable, "-m", "worker.sweeper"]


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def claim(stage: Stage, job_id: str, lease_seconds: float) -> None:
    with database.transaction(stage.bind) as session:
        assert runs.claim(session, job_id, "a worker that is gone", lease_seconds) is not None


def has_job(stage: Stage, job_id: str) -> bool:
    with database.transaction(stage.bind) as session:
        return session.get(Job, job_id) is not None


def sweep(stage: Stage, redis_url: str | None = None) -> list[str]:
    app = queue.producer(redis_url or stage.settings.redis_url)
    return sweeper.sweep(stage.bind, app, Storage(stage.settings.data_dir))


def test_only_expired_leases_are_taken_back(stage: Stage) -> None:
    expired, held = stage.create_job(), stage.create_job()
    claim(stage, expired, lease_seconds=0.05)
    claim(stage, held, lease_seconds=60)
    time.sleep(0.1)
    assert sweep(stage) == [expired]
    assert (stage.job(expired).status, stage.job(held).status) == ("queued", "running")
    assert stage.waiting_messages() == 1
    assert sweep(stage) == []


def test_a_requeued_job_runs_to_its_end(stage: Stage) -> None:
    job_id = stage.create_job(steps=12)
    assert stage.run(job_id, crash_at=7, crash_attempts=1).status == "queued"
    claim(stage, job_id, lease_seconds=0.05)  # and its worker is gone
    time.sleep(0.1)
    assert sweep(stage) == [job_id]
    job = stage.run(job_id)
    assert (job.status, job.attempt) == ("succeeded", 3)
    assert [start["step"] for start in stage.trace(job_id)] == [0, 5]


def test_there_is_a_message_for_each_slot_that_a_job_could_have_and_no_more(stage: Stage) -> None:
    for _ in range(3):
        stage.create_job()
    for _ in range(5):
        sweep(stage)
    assert stage.waiting_messages() == 3
    for _ in range(3):
        stage.create_job()
    sweep(stage)
    assert stage.waiting_messages() == stage.settings.worker_slots == 4
    stage.redis.flushall()
    sweep(stage)
    assert stage.waiting_messages() == 4


def test_another_sweeper_at_work_is_left_alone(stage: Stage) -> None:
    job_id = stage.create_job()
    claim(stage, job_id, lease_seconds=0.05)
    time.sleep(0.1)
    with database.transaction(stage.bind) as session:
        assert database.try_lock(session, sweeper.LOCK_KEY)
        assert sweep(stage) == []
        assert stage.job(job_id).status == "running"
    assert sweep(stage) == [job_id]


def test_a_dead_broker_does_not_stop_the_leases(stage: Stage) -> None:
    job_id = stage.create_job()
    claim(stage, job_id, lease_seconds=0.05)
    time.sleep(0.1)
    began = time.monotonic()
    assert sweep(stage, "redis+socket:///nowhere/redis.sock") == [job_id]
    assert time.monotonic() - began < 5


def test_the_process_outlives_its_servers_and_ends_at_once(database_url: str, redis_url: str, tmp_path: Path) -> None:
    sockets = Path(tempfile.mkdtemp(prefix="slimtune-proxy-"))  # not tmp_path: a socket's path may have 107 bytes
    proxy = DatabaseProxy(database_url, sockets)
    with open_stage(database_url, redis_url, tmp_path) as stage:
        stale = stage.settings.data_dir / "tmp" / "upload-of-yesterday"
        stale.parent.mkdir()
        stale.write_bytes(b"half")
        os.utime(stale, (time.time() - 200_000,) * 2)
        storage = Storage(stage.settings.data_dir)
        nobodys = storage.make_folder("datasets/ds_of_nobody")
        storage.doubt("datasets/ds_of_nobody")
        parts = storage.make_folder("parts/upload_of_nobody")
        for doubt in storage.path("doubtful").iterdir():
            os.utime(doubt, (time.time() - 4_000,) * 2)
        old = stage.create_job()
        stage.request(old, "cancel")
        with database.transaction(stage.bind) as session:
            session.execute(update(Job).values(finished_at=func.now() - timedelta(days=2)))
        stage.overrides |= {"DATABASE_URL": proxy.url, "SLIMTUNE_KEEP_JOBS_DAYS": "1"}
        process = stage.start("sweeper", SWEEPER)
        wait_for("a clean tmp folder", lambda: not stale.exists())
        wait_for("no files without a row", lambda: not nobodys.exists())
        wait_for("no parts without an upload", lambda: not parts.exists())
        wait_for("no job that has had its time", lambda: not has_job(stage, old))

        proxy.refuse()
        job_id = stage.create_job()
        claim(stage, job_id, lease_seconds=0.05)
        time.sleep(0.7)
        assert process.poll() is None
        assert stage.job(job_id).status == "running"
        proxy.answer()
        stage.end(job_id, "queued", seconds=5)
        wait_for("a message", lambda: stage.waiting_messages() == 1, seconds=2)
        stage.redis.flushall()
        wait_for("the message again", lambda: stage.waiting_messages() == 1, seconds=2)

        proxy.hang()
        time.sleep(0.5)
        began = time.monotonic()
        process.terminate()
        assert process.wait(5) == 0
        assert time.monotonic() - began < 2
    proxy.close()
    shutil.rmtree(sockets)
