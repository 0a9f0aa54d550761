"""The supervisor against trainers that end by themselves: well, badly, and in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text, update

from service import calibrations
from service.database import transaction
from service.failures import HINTS
from service.models import Checkpoint
from tests.integration.fake_trainer import loss_at
from tests.integration.stage import Stage, open_stage
from worker.slot import device_slot
from worker.supervisor import supervise


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_job_runs_to_its_end(stage: Stage) -> None:
    job_id = stage.create_job(steps=12)
    job = stage.run(job_id)

    assert job.status == "succeeded", job.error
    assert (job.attempt, job.step, job.tokens, job.failures) == (1, 12, 12 * 64, 0)
    # The check at the end is part of the run: its peak counts.
    assert (job.probed_peak_bytes, job.measured_peak_bytes) == (99_000_000, 100_000_500)
    assert job.gradient_check == {"chunk_length": 64, "compared_with": 32, "relative_error": 1e-7}
    rows = stage.metrics(job_id)
    assert [(row.step, row.loss) for row in rows] == [(step, loss_at(step)) for step in range(1, 13)]
    assert [row.validation_loss for row in rows if row.step in (5, 10)] == [loss_at(5) + 0.1, loss_at(10) + 0.1]
    # keep = 2, the best (10) among them: the folder of step 5 is gone with its row, and nothing else lies there.
    assert [row.step for row in stage.checkpoints(job_id)] == [12, 10]
    assert names(stage.folder(job_id, attempt=1)) == ["step-00000010", "step-00000012"]
    kinds = [kind for kind, _ in stage.events(job_id)]
    assert kinds == [
        "queued", "planned", "started", "training", "probed", "evaluation", "checkpoint", "evaluation", "checkpoint",
        "checkpoint", "succeeded",
    ]  # fmt: skip
    assert job.output_model_id is not None
    assert stage.events(job_id, "succeeded")[0][1]["step"] == 12


def test_a_finished_job_teaches_the_planner(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 0.02 s where the plan says 0.1; and a lesson that goes wrong fails no job."""
    with transaction(stage.bind) as session:
        calibrations.store(session, "cpu", "w", {"device": "cpu", "source": "none"})
    job = stage.run(stage.create_job())
    with transaction(stage.bind) as session:
        data = calibrations.for_job(session, job.model_config, job.train)
    assert data is not None
    assert data["time_factor"] == pytest.approx(0.2)

    monkeypatch.setattr(calibrations, "learn", lambda session, _: session.execute(text("SELECT broken")))
    assert stage.run(stage.create_job()).status == "succeeded"


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_without_room_for_a_lock_the_job_waits(stage: Stage, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def full(file: int | Path, *rest: Any) -> Any:
        if isinstance(file, Path) and file.suffix != ".lock":
            return real(file, *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job_id = stage.create_job(steps=1)
    with monkeypatch.context() as patched:
        patched.setattr(f"worker.slot.os.{call}", full)
        job = stage.run(job_id)
    assert (job.status, job.attempt) == ("queued", 0)
    assert stage.run(job_id).status == "succeeded"


def test_the_trainer_gets_the_allocator_and_no_secrets(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "SLIMTUNE_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    job_id = stage.create_job(steps=1)
    assert stage.run(job_id).status == "succeeded"
    environment = stage.trace(job_id)[0]["environment"]
    assert environment["MALLOC_ARENA_MAX"] == "1"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert "secret" not in environment.values()
    assert set(environment) <= {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS",
        "MKL_NUM_THREADS", "SLIMTUNE_REPORT_FD", "GOMP_SPINCOUNT", "LD_PRELOAD", "MKL_DISABLE_FAST_MM",
    }  # fmt: skip


def test_a_killed_trainer_resumes_at_its_checkpoint(stage: Stage) -> None:
    job_id = stage.create_job(steps=12)
    job = stage.run(job_id, crash_at=7, crash_attempts=1, crash_half_line=True)

    assert (job.status, job.failures, job.step) == ("queued", 0, 7)  # it made a checkpoint, so this is no failure
    assert stage.waiting_messages() == 1
    failed = stage.events(job_id, "trainer_failed")[0][1]
    assert (failed["status"], failed["signal"]) == (-9, "SIGKILL")
    assert failed["log"] == ["line of the log before the crash"]

    job = stage.run(job_id, crash_at=7, crash_attempts=1)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert [start["step"] for start in stage.trace(job_id)] == [0, 5]
    rows = stage.metrics(job_id)
    assert [(row.step, row.loss) for row in rows] == [(step, loss_at(step)) for step in range(1, 13)]
    assert [row.attempt for row in rows] == [1] * 5 + [2] * 7


def test_a_job_that_always_crashes_fails_with_the_cause(stage: Stage) -> None:
    job_id = stage.create_job(steps=12)
    statuses = [stage.run(job_id, crash_at=3).status for _ in range(3)]

    assert statuses == ["queued", "queued", "failed"]
    error = stage.job(job_id).error
    assert error is not None
    assert error["code"] == "attempts_exhausted"
    assert error["cause"]["code"] == "trainer_crashed"
    assert "SIGKILL" in error["cause"]["message"]
    assert error["cause"]["step"] == 3


@pytest.mark.parametrize(
    ("code", "status"), [("diverged", "failed"), ("model_invalid", "failed"), ("disk_full", "paused")]
)
def test_some_errors_end_a_run_at_once(stage: Stage, code: str, status: str) -> None:
    job_id = stage.create_job()
    job = stage.run(job_id, error_code=code)
    assert (job.status, job.failures) == (status, 0)
    assert job.error == {"code": code, "message": "as told", "step": 1, "hint": HINTS[code]}


def test_over_the_cap_means_smaller_chunks(stage: Stage) -> None:
    job_id = stage.create_job(chunk_length=64)
    lengths = []
    while (job := stage.run(job_id, memory_chunk_length=16)).status == "queued":
        lengths.append(job.plan["chunk_length"])
        assert job.failures == 0
    assert job.status == "succeeded", job.error
    assert 1 <= len(lengths) <= 2
    assert all(after <= before // 2 for before, after in zip([64, *lengths], lengths, strict=False))
    assert lengths[-1] <= 16
    assert job.memory_replans == len(lengths)
    assert job.predicted_peak_bytes == job.plan["predicted_peak_bytes"]


def test_over_the_cap_whatever_the_plan_fails_with_the_peak(stage: Stage) -> None:
    job_id = stage.create_job(chunk_length=64)
    for _ in range(4):
        job = stage.run(job_id, memory_chunk_length=0)
    assert (job.status, job.memory_replans, job.attempt) == ("failed", 3, 4)
    assert job.error is not None
    assert (job.error["code"], job.error["peak_bytes"]) == ("memory_cap_exceeded", 987_654_321)


@pytest.mark.parametrize("harm", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_skipped(stage: Stage, harm: str) -> None:
    job_id = stage.create_job(steps=20)
    assert stage.run(job_id, crash_at=13, crash_attempts=1).status == "queued"
    weights = stage.folder(job_id, attempt=1) / "step-00000010" / "model.safetensors"
    data = weights.read_bytes()
    if harm == "missing":
        weights.unlink()
    else:
        weights.write_bytes(data[:-1] if harm == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))

    job = stage.run(job_id, crash_at=13, crash_attempts=1)
    assert job.status == "succeeded", job.error
    assert [start["step"] for start in stage.trace(job_id)] == [0, 5]
    ((_, event),) = stage.events(job_id, "checkpoint_damaged")
    assert event["step"] == 10
    assert "model.safetensors" in event["reason"]
    assert [row.loss for row in stage.metrics(job_id)] == [loss_at(step) for step in range(1, 21)]


def test_what_no_row_knows_is_removed_before_the_start(stage: Stage) -> None:
    job_id = stage.create_job(steps=12)
    for name in ("step-00000009", "attempt-0000/step-00000005.tmp", "attempt-0001/step-00000010"):
        (stage.folder(job_id) / name).mkdir(parents=True)
        (stage.folder(job_id) / name / "model.safetensors").write_bytes(b"half")
    assert stage.run(job_id).status == "succeeded"
    assert names(stage.folder(job_id)) == ["attempt-0001"]
    assert names(stage.folder(job_id, attempt=1)) == ["step-00000010", "step-00000012"]


def test_the_checkpoints_of_an_older_version_are_found_and_kept(stage: Stage) -> None:
    """They lie beside the folders of the attempts; and what those of earlier attempts hold is kept as well."""
    job_id = stage.create_job(steps=20)
    assert stage.run(job_id, crash_at=8, crash_attempts=1).status == "queued"
    old = stage.folder(job_id) / "step-00000005"
    (stage.folder(job_id, attempt=1) / old.name).rename(old)
    with transaction(stage.bind) as session:
        session.execute(update(Checkpoint).values(path=str(old.relative_to(stage.settings.data_dir))))

    assert stage.run(job_id, crash_at=13, crash_attempts=2).status == "queued"
    assert stage.run(job_id, crash_at=11, crash_attempts=3).status == "queued"
    assert names(stage.folder(job_id)) == ["attempt-0002", "attempt-0003", old.name]
    assert stage.run(job_id).status == "succeeded"
    assert [start["step"] for start in stage.trace(job_id)] == [0, 5, 10, 10]
    assert names(stage.folder(job_id)) == ["attempt-0002", "attempt-0004"]
    assert names(stage.folder(job_id, attempt=4)) == ["step-00000015", "step-00000020"]


def test_a_flood_of_messages_loses_nothing(stage: Stage) -> None:
    job_id = stage.create_job(steps=3_000)
    job = stage.run(job_id, flood=3_000)
    assert (job.status, job.step) == ("succeeded", 3_000)
    assert [row.step for row in stage.metrics(job_id)] == list(range(1, 3_001))


def test_a_trainer_that_talks_nonsense_is_ended(stage: Stage) -> None:
    job_id = stage.create_job()
    job = stage.run(job_id, garbage=True)
    assert (job.status, job.failures) == ("queued", 1)
    error = stage.events(job_id, "trainer_failed")[0][1]["error"]
    assert error["code"] == "protocol_error"
    assert "no such thing" in error["message"]


def test_a_message_for_a_job_that_does_not_wait_does_nothing(stage: Stage) -> None:
    job_id = stage.create_job(steps=3)
    assert stage.run(job_id).status == "succeeded"
    before = stage.events(job_id)
    assert stage.run(job_id).attempt == 1
    assert stage.events(job_id) == before
    supervise("job_" + "0" * 32, stage.settings)


def test_a_device_whose_slots_are_in_use_takes_no_job(stage: Stage) -> None:
    job_id = stage.create_job(steps=3)
    with ExitStack() as held:
        for _ in range(stage.settings.worker_slots):
            slot = device_slot(stage.settings.data_dir, stage.device, slots=stage.settings.worker_slots, wait_seconds=0)
            assert held.enter_context(slot) is not None
        job = stage.run(job_id)
        assert (job.status, job.attempt) == ("queued", 0)
    assert stage.run(job_id).status == "succeeded"
