"""What is remembered of machines and of jobs: every calibration, and the memory that plans did not count with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, select

from service import calibrations, jobs, runs
from service.database import transaction
from service.models import CalibrationRecord, Job
from service.status import Desired
from service.storage import Storage
from slim_core.planning import default_calibration
from tests.integration.seed import PLAN, add_checkpoint, add_job, claim, metric
from worker.messages import Done, Failure
from worker.outcome import Ending, conclude

MB = 1_000_000
CALIBRATION = replace(default_calibration(), source="measured", runtime_bytes=100 * MB).to_json()
"""Under which the plan of tests/integration/seed.py was made: 400 MB, under a cap of 500 MB."""


@pytest.fixture(autouse=True)
def calibrated(bind: Engine) -> None:
    with transaction(bind) as session:
        calibrations.store(session, "cpu", "w1", CALIBRATION)


def attempt(bind: Engine, job: Job, peak: int, *, counted: int = 0, **lesson: Any) -> None:
    """One attempt of another job of the same shape, whose steps held `peak`; its plan counted with `counted` more."""
    other = add_job(bind, job.dataset_id)
    with transaction(bind) as session:
        row = jobs.get(session, other.id)
        predicted = PLAN["predicted_peak_bytes"] + counted  # type: ignore[operator]
        row.plan = {**PLAN, "predicted_peak_bytes": predicted, "breakdown": {"learned": counted}}
    run = claim(bind, other.id)
    with transaction(bind) as session:
        runs.record_metrics(session, run.id, run.attempt, [metric(1, peak_bytes=peak)])
        calibrations.learn_peak(session, runs.hold(session, run.id, run.attempt), **lesson)


def excess(bind: Engine, job: Job, **train: Any) -> int:
    with transaction(bind) as session:
        data = calibrations.for_job(session, job.model_config, job.train | train)
    assert data is not None
    return int(data.get("peak_excess_bytes", 0))


def test_every_calibration_is_kept(bind: Engine, job: Job) -> None:
    with transaction(bind) as session:
        assert calibrations.store(session, "cpu", "w2", CALIBRATION | {"threads": 7}) == 2
        assert calibrations.store(session, "cuda", "w2", CALIBRATION | {"device": "cuda"}) == 1
        assert calibrations.store(session, "cpu", "w1", CALIBRATION | {"threads": 8}) == 3
    with transaction(bind) as session:
        rows = session.scalars(select(CalibrationRecord).filter_by(device="cpu").order_by("version")).all()
        newest = calibrations.for_job(session, job.model_config, job.train)
    assert [(row.version, row.worker, row.data["threads"]) for row in rows] == [
        (1, "w1", 1),
        (2, "w2", 7),
        (3, "w1", 8),
    ]
    assert newest is not None
    assert (newest["version"], newest["threads"]) == (3, 8)


def test_what_a_job_holds_beyond_its_plan_is_counted_with(bind: Engine, job: Job) -> None:
    attempt(bind, job, 399 * MB, finished=True)
    attempt(bind, job, 403 * MB, finished=True)  # a reading may be too high by as much
    assert excess(bind, job) == 0
    attempt(bind, job, 430 * MB, finished=False)
    assert excess(bind, job) == 30 * MB
    assert excess(bind, job, precision="bfloat16") == 0
    attempt(bind, job, 410 * MB, finished=True)  # of an older plan: less than is known
    assert excess(bind, job) == 30 * MB
    attempt(bind, job, 440 * MB, counted=30 * MB, finished=True)
    assert excess(bind, job) == 40 * MB


def test_it_shrinks_with_jobs_that_keep_within_their_plans(bind: Engine, job: Job) -> None:
    attempt(bind, job, 430 * MB, finished=True)
    attempt(bind, job, 430 * MB, counted=30 * MB, finished=False)  # stopped: it may have needed more later
    assert excess(bind, job) == 30 * MB
    attempt(bind, job, 430 * MB, counted=30 * MB, finished=True)
    assert excess(bind, job) == 27 * MB
    shrinking = [27 * MB]
    while shrinking[-1]:
        attempt(bind, job, 400 * MB, counted=shrinking[-1], finished=True)
        shrinking.append(excess(bind, job))
    assert shrinking == sorted(shrinking, reverse=True)
    assert 15 < len(shrinking) < 25


def test_what_is_no_property_of_the_model_teaches_nothing(bind: Engine, job: Job) -> None:
    attempt(bind, job, 900 * MB, finished=True)
    attempt(bind, job, 0, finished=False, over_cap_bytes=900 * MB)
    assert excess(bind, job) == 0
    with transaction(bind) as session:  # that the job was not planned with
        calibrations.store(session, "cpu", "w1", CALIBRATION | {"source": "another"})
    attempt(bind, job, 430 * MB, finished=True)
    assert excess(bind, job) == 0


def test_an_attempt_over_its_cap_is_planned_anew_with_what_it_taught(bind: Engine, job: Job) -> None:
    run = claim(bind, job.id)
    failure = Failure("memory_cap_exceeded", "too much", 1, 499 * MB)
    with transaction(bind) as session:
        planned_anew = conclude(session, run, Desired.RUN, Ending(1, 4, None, failure))
    learned = 100 * MB + calibrations.LEAST_EXCESS_BYTES  # more than the cap, by how much nobody knows
    assert excess(bind, job) == learned
    assert planned_anew.status == "queued"
    assert planned_anew.plan["breakdown"]["learned"] == learned
    assert sum(planned_anew.plan["breakdown"].values()) == planned_anew.predicted_peak_bytes <= 500 * MB
    assert "earlier jobs of this model held beyond their plans" in planned_anew.plan["reason"]
    assert planned_anew.plan["calibration_version"] == 1


def test_a_lesson_does_not_stand_in_the_way_of_the_next_attempt(bind: Engine, job: Job) -> None:
    """With what it counts for, nothing would fit under this job's cap; a smaller plan may all the same."""
    with transaction(bind) as session:
        calibrations.store(session, "cpu", "w1", CALIBRATION | {"runtime_bytes": 450 * MB})
    run = claim(bind, job.id)
    with transaction(bind) as session:
        failure = Failure("memory_cap_exceeded", "too much", 1, 499 * MB)
        planned_anew = conclude(session, run, Desired.RUN, Ending(1, 4, None, failure))
    assert excess(bind, job) > 50 * MB
    assert planned_anew.status == "queued"
    assert planned_anew.plan["breakdown"]["learned"] == 0


def test_a_succeeded_job_teaches_its_peak(bind: Engine, storage: Storage, job: Job) -> None:
    run = claim(bind, job.id)
    with transaction(bind) as session:
        runs.record_metrics(session, run.id, run.attempt, [metric(1, peak_bytes=420 * MB)])
        runs.record_gradient_check(session, run.id, run.attempt, 480 * MB, {})  # of other chunks than the plan's
        add_checkpoint(session, storage, run, 10)
        ending = Ending(10, 0, Done(10, "completed"), final_checkpoint=True)
        assert conclude(session, run, Desired.RUN, ending).status == "succeeded"
    assert excess(bind, job) == 20 * MB


def test_the_typical_step_is_the_median_of_the_latest(bind: Engine, job: Job) -> None:
    """One that took a minute, because the machine was asleep, does not make the others take one."""

    def typical() -> float | None:
        with transaction(bind) as session:
            return jobs.get(session, job.id).typical_step_seconds

    assert typical() is None
    run = claim(bind, job.id)
    for step in range(1, 31):
        seconds = 9.0 if step <= 10 else 60.0 if step == 30 else step / 100
        with transaction(bind) as session:
            runs.record_metrics(session, run.id, run.attempt, [metric(step, step_seconds=seconds)])
        if step == 10:
            assert typical() == 9.0
    assert typical() == pytest.approx((0.20 + 0.21) / 2)
    with transaction(bind) as session:
        runs.release(session, run.id, run.attempt, "memory_cap_exceeded", progressed=True, plan=PLAN)
    assert typical() is None  # the steps of another plan
    again = claim(bind, job.id)
    with transaction(bind) as session:
        runs.record_metrics(session, again.id, again.attempt, [metric(3, step_seconds=0.5)])
    assert typical() == 0.5
