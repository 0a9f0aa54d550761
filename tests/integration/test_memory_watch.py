"""The supervisor's watch over the memory of a trainer and of all that it starts. Each violation is also shown to happen
where the watch is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service import calibrations, database
from slim_core.planning import default_calibration
from tests.integration.stage import Stage, alive, open_stage, wait_for
from worker import attempt
from worker.memory_watch import READING_EXCESS_BYTES, MemoryWatch

MIB = 1 << 20
CAP_BYTES = 100 * MIB
HELD_BYTES = 150 * MIB


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        # The fake trainer has no torch: with its own runtime the planner finds plans under a small cap.
        calibration = replace(default_calibration(), runtime_bytes=10 * MIB)
        with database.transaction(stage.bind) as session:
            calibrations.store(session, "cpu", "worker", calibration.to_json())
        yield stage


class NoWatch(MemoryWatch):
    def _watch(self) -> None:
        pass


@pytest.mark.parametrize("where", ["trainer", "child", "orphan"])
@pytest.mark.parametrize("watched", [True, False])
def test_memory_over_the_cap_ends_the_attempt_and_the_job_is_planned_anew(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, where: str, watched: bool
) -> None:
    if not watched:
        monkeypatch.setattr(attempt, "MemoryWatch", NoWatch)
    job_id = stage.create_job(memory_cap_bytes=CAP_BYTES)
    options = {
        "hold_bytes": HELD_BYTES,
        "hold_in": where,
        "hold_seconds": 60 if watched else 0.5,
        "hold_attempts": 1,
    }
    job = stage.run(job_id, **options)
    if not watched:
        assert job.status == "succeeded"
        assert stage.trace(job_id, "held")
        return

    assert (job.status, job.memory_replans, job.failures) == ("queued", 1, 0)
    ((_, failed),) = stage.events(job_id, "trainer_failed")
    assert failed["error"]["code"] == "memory_cap_exceeded"
    assert CAP_BYTES + READING_EXCESS_BYTES < failed["error"]["peak_bytes"] < HELD_BYTES + 50 * MIB
    assert not stage.trace(job_id, "held")
    orphans = [entry["orphan"] for entry in stage.trace(job_id, "orphan")]
    wait_for("the orphan's end", lambda: not any(map(alive, orphans)))
    assert job.plan["chunk_length"] <= 32
    again = stage.run(job_id, **options)
    assert (again.status, again.attempt) == ("succeeded", 2)


def test_a_job_that_always_exceeds_its_cap_fails_with_the_peak_and_a_hint(stage: Stage) -> None:
    job_id = stage.create_job(memory_cap_bytes=CAP_BYTES)
    for replans in (1, 2, 3):
        job = stage.run(job_id, hold_bytes=HELD_BYTES, hold_in="child", hold_seconds=60)
        assert (job.status, job.memory_replans) == ("queued", replans)
    job = stage.run(job_id, hold_bytes=HELD_BYTES, hold_in="child", hold_seconds=60)
    assert (job.status, job.attempt) == ("failed", 4)
    assert job.error is not None
    assert job.error["code"] == "memory_cap_exceeded"
    assert job.error["peak_bytes"] > CAP_BYTES
    assert job.error["hint"].startswith("raise memory_cap")
    assert "3 smaller plans" in job.error["hint"]


def test_what_lies_under_the_cap_is_left_alone(stage: Stage) -> None:
    """Also a child's, and also at the very cap: a reading may be that wrong."""
    job_id = stage.create_job(memory_cap_bytes=CAP_BYTES)
    job = stage.run(job_id, hold_bytes=CAP_BYTES - 30 * MIB, hold_in="child")
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert stage.trace(job_id, "held")


def test_a_gpu_s_cap_does_not_bound_the_host_s_memory(stage: Stage) -> None:
    job_id = stage.create_job(memory_cap_bytes=CAP_BYTES)
    job = stage.run(job_id, hold_bytes=HELD_BYTES, device="cuda")
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert stage.trace(job_id, "held")


def test_a_dataset_that_cannot_be_parsed_under_the_cap_is_not_planned_anew(stage: Stage) -> None:
    job_id = stage.create_job()
    job = stage.run(job_id, error_code="document_too_large")
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == "document_too_large"
