"""A job that failed says what happened, at which step, and what to do: for every cause, in the row and over the API."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from api.app import create_app
from service import database, queue, runs
from service.failures import HINTS
from service.models import Job
from service.storage import Storage
from tests.integration.stage import HERE, ROOT, Stage, open_stage
from worker import sweeper
from worker.supervisor import supervise

CAP_BYTES = 512 << 20
SILENT = 600
"""Seconds of a fake trainer that has nothing to do but to hold what it holds."""


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def fake(**options: Any) -> Callable[[Stage, str], None]:
    command = [sys.executable, str(HERE / "fake_trainer.py"), json.dumps({"step_seconds": 0.0, **options})]
    return started_by(command)


def started_by(command: list[str]) -> Callable[[Stage, str], None]:
    return lambda stage, job_id: supervise(job_id, stage.settings, command=command, device_wait_seconds=0.2)


def without_dataset(stage: Stage, job_id: str) -> None:
    """A real trainer, whose dataset is gone."""
    shutil.rmtree(stage.settings.data_dir / "datasets", ignore_errors=True)
    supervise(job_id, stage.settings)


def lost(stage: Stage, job_id: str) -> None:
    """A worker that vanishes, and the sweep that finds it out."""
    with database.transaction(stage.bind) as session:
        assert runs.claim(session, job_id, "a worker that is gone", lease_seconds=0.0) is not None
    sweep(stage)


def sweep(stage: Stage) -> None:
    sweeper.sweep(stage.bind, queue.producer(stage.settings.redis_url), Storage(stage.settings.data_dir))


CAUSES: dict[str, tuple[Callable[[Stage, str], None], str]] = {
    "diverged": (fake(error_code="diverged"), "diverged"),
    "dataset_invalid": (fake(error_code="dataset_invalid"), "dataset_invalid"),
    "document_too_large": (fake(error_code="document_too_large"), "document_too_large"),
    "model_invalid": (fake(error_code="model_invalid"), "model_invalid"),
    "over the cap, says the trainer": (fake(memory_chunk_length=0), "memory_cap_exceeded"),
    "over the cap, says the supervisor": (
        fake(hold_bytes=CAP_BYTES + (64 << 20), hold_seconds=SILENT),
        "memory_cap_exceeded",
    ),
    "an error of the trainer's": (without_dataset, "trainer_error"),
    "a crash": (fake(crash_at=1), "trainer_crashed"),
    "an end without a word": (started_by([sys.executable, "-c", "raise SystemExit('so it goes')"]), "trainer_crashed"),
    "garbage in the pipe": (fake(garbage=True), "protocol_error"),
    "a code that nobody knows": (fake(error_code="unheard_of"), "protocol_error"),
    "no trainer to start": (started_by(["/nowhere/trainer"]), "supervisor_error"),
    "lost workers": (lost, "worker_lost"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_failed_job_says_what_happened_where_and_what_to_do(stage: Stage, cause: str) -> None:
    fail, code = CAUSES[cause]
    with TestClient(create_app(stage.settings), base_url="http://127.0.0.1") as client:
        job_id = create_job(client)
        for _ in range(runs.MAX_LOST_LEASES):
            fail(stage, job_id)
            if stage.job(job_id).status == "failed":
                break
        job = client.get(f"/jobs/{job_id}").json()
    assert job["status"] == "failed"
    error = job["error"]
    assert error == stage.job(job_id).error
    if error["code"] == "attempts_exhausted":
        assert error["cause"]["hint"] == error["hint"]
        assert error["cause"]["message"] in error["message"]
        check(error["cause"])
        error = {**error, "code": error["cause"]["code"]}
    assert error["code"] == code
    check(error)
    if cause != "lost workers":
        assert stage.events(job_id, "trainer_failed")[-1][1]["error"]["code"] == code


def test_so_does_a_job_that_waits_for_space(stage: Stage) -> None:
    with TestClient(create_app(stage.settings), base_url="http://127.0.0.1") as client:
        job_id = create_job(client)
        fake(error_code="disk_full")(stage, job_id)
        job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"]) == ("paused", "disk_full")
    check(job["error"])


def create_job(client: TestClient) -> str:
    dataset = client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 100)}).json()["id"]
    body = {"model": "performer-tiny", "dataset": dataset, "sequence_length": 64, "steps": 12, "memory_cap": CAP_BYTES}
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def check(error: dict[str, Any]) -> None:
    assert error["code"] in HINTS
    assert error["message"].strip()
    assert type(error["step"]) is int
    assert error["hint"].strip()


def test_what_the_trainer_said_last_is_an_event_and_in_the_message(stage: Stage) -> None:
    job_id = stage.create_job()
    fake(crash_at=1)(stage, job_id)
    event = stage.events(job_id, "trainer_failed")[0][1]
    assert event["log"] == ["line of the log before the crash"]
    assert event["log"][0] in event["error"]["message"]
    assert event["error"]["step"] == 1


def test_what_the_trainer_of_a_lost_worker_said_last_is_an_event(stage: Stage) -> None:
    job_id = stage.create_job()
    supervisor = stage.supervisor(job_id, hang_at=2)
    stage.reach(job_id, 2)
    supervisor.kill()
    supervisor.wait()
    with database.transaction(stage.bind) as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=Job.created_at))
    sweep(stage)
    kinds = [kind for kind, _ in stage.events(job_id)]
    assert kinds[-2:] == ["trainer_failed", "requeued"]
    event = stage.events(job_id, "trainer_failed")[0][1]
    assert event["log"] == ["line of the log before the silence"]
    assert (event["error"]["code"], event["error"]["step"]) == ("worker_lost", 2)


def test_a_log_that_cannot_be_read_keeps_no_job_from_the_queue(stage: Stage) -> None:
    job_id = stage.create_job()
    log = stage.folder(job_id).parent / "attempt-1.stderr"
    log.mkdir(parents=True)
    lost(stage, job_id)
    assert stage.job(job_id).status == "queued"
    assert stage.events(job_id, "trainer_failed") == []


def test_the_codes_are_documented() -> None:
    """The table of docs/reliability.md, with the hints that it gives."""
    section = (ROOT / "docs" / "reliability.md").read_text().split("## Errors of jobs", 1)[1].split("\n## ", 1)[0]
    rows = [line.replace("`", "").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert {code.strip(): hint.strip() for _, code, _, hint, _ in rows} == HINTS
