"""The run's side of a job: claims, the fence, leases, reports, ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from service import checkpoints, events, jobs, metrics, runs
from service.database import transaction
from service.errors import FencedError
from service.failures import job_error
from service.models import Job
from service.runs import ClaimedJob
from service.status import Action, Desired
from service.storage import Storage
from tests.integration.seed import LEASE_SECONDS, PLAN, add_checkpoint, add_dataset, add_job, claim, metric


@pytest.fixture
def run(bind: Engine, job: Job) -> ClaimedJob:
    return claim(bind, job.id)


def state(bind: Engine, job_id: str) -> Job:
    with transaction(bind) as session:
        return jobs.get(session, job_id)


def log(bind: Engine, job_id: str) -> list[tuple[int, str]]:
    with transaction(bind) as session:
        return [(event.attempt, event.type) for event in events.page(session, job_id)[0]]


def expire(bind: Engine, job_id: str) -> None:
    with transaction(bind) as session:
        statement = "UPDATE jobs SET lease_until = clock_timestamp() - interval '1 second' WHERE id = :id"
        session.execute(text(statement), {"id": job_id})


def test_a_claim_hands_over_all_that_a_run_needs(bind: Engine, storage: Storage, job: Job) -> None:
    claimed = claim(bind, job.id)
    assert (claimed.attempt, claimed.keep, claimed.step) == (1, 2, 0)
    assert claimed.plan == PLAN
    assert storage.path(claimed.dataset_path).read_text().startswith("Hello")
    assert claimed.validation_path is None
    assert claimed.initial_weights_path is None
    row = state(bind, job.id)
    assert (row.status, row.worker) == ("running", "worker-1")
    assert row.started_at is not None
    with transaction(bind) as session:
        left = session.scalar(text("SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM jobs"))
    assert LEASE_SECONDS - 5 < left <= LEASE_SECONDS


def test_a_claim_of_what_is_not_queued_is_none(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        assert runs.claim(session, job.id, "worker-2", LEASE_SECONDS) is None
        assert runs.claim(session, "job_" + "0" * 32, "worker-2", LEASE_SECONDS) is None
    assert state(bind, job.id).attempt == run.attempt


def test_a_claim_does_not_wait_for_another(bind: Engine, job: Job) -> None:
    with transaction(bind) as first:
        assert runs.claim(first, job.id, "worker-1", LEASE_SECONDS) is not None
        with transaction(bind) as second:
            second.execute(text("SET LOCAL lock_timeout = '1s'"))
            assert runs.claim(second, job.id, "worker-2", LEASE_SECONDS) is None
    assert state(bind, job.id).worker == "worker-1"


def test_of_many_concurrent_claims_one_wins(bind: Engine, storage: Storage) -> None:
    dataset = add_dataset(bind, storage)
    for _ in range(10):
        job = add_job(bind, dataset.id)
        start = threading.Barrier(6)
        won: list[str] = []

        def compete(worker: str, job: Job = job, start: threading.Barrier = start, won: list[str] = won) -> None:
            start.wait()
            with transaction(bind) as session:
                if runs.claim(session, job.id, worker, LEASE_SECONDS) is not None:
                    won.append(worker)

        threads = [threading.Thread(target=compete, args=(f"worker-{number}",)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        row = state(bind, job.id)
        assert (row.attempt, row.worker) == (1, won[0])
        assert log(bind, job.id).count((1, "started")) == 1


WRITES: dict[str, Callable[[Session, str, int], Any]] = {
    "renew": lambda session, job_id, attempt: runs.renew(session, job_id, attempt, LEASE_SECONDS),
    "add_event": lambda session, job_id, attempt: runs.add_event(session, job_id, attempt, "late"),
    "record_metrics": lambda session, job_id, attempt: runs.record_metrics(session, job_id, attempt, [metric(1)]),
    "record_evaluation": lambda session, job_id, attempt: runs.record_evaluation(session, job_id, attempt, 1, 2.0),
    "register": lambda session, job_id, attempt: checkpoints.register(
        session, job_id, attempt, 1, files=[], path="jobs/x/checkpoints/step-1"
    ),
    "finish": lambda session, job_id, attempt: runs.finish(session, job_id, attempt, "cancelled"),
    "release": lambda session, job_id, attempt: runs.release(session, job_id, attempt, "late", progressed=True),
}


def everything(bind: Engine) -> list[Any]:
    with transaction(bind) as session:
        tables = ("jobs", "job_events", "metrics", "checkpoints", "models")
        return [session.execute(text(f"SELECT * FROM {table}")).all() for table in tables]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_of_an_earlier_attempt_is_refused_and_has_no_effect(
    bind: Engine, job: Job, run: ClaimedJob, write: str
) -> None:
    expire(bind, job.id)
    with transaction(bind) as session:
        assert runs.requeue_expired(session) == [job.id]
    second = claim(bind, job.id, "worker-2")
    before = everything(bind)
    with pytest.raises(FencedError), transaction(bind) as session:
        WRITES[write](session, job.id, run.attempt)
    assert everything(bind) == before
    with transaction(bind) as session:
        WRITES[write](session, job.id, second.attempt)  # while the holder's passes
    assert everything(bind) != before


@pytest.mark.parametrize("write", WRITES)
def test_a_write_about_a_job_that_no_longer_runs_is_refused(
    bind: Engine, job: Job, run: ClaimedJob, write: str
) -> None:
    with transaction(bind) as session:
        runs.release(session, job.id, run.attempt, "drained", progressed=True)
    before = everything(bind)
    with pytest.raises(FencedError), transaction(bind) as session:
        WRITES[write](session, job.id, run.attempt)
    assert everything(bind) == before


def test_a_write_holds_the_fence_until_its_commit(bind: Engine, job: Job, run: ClaimedJob) -> None:
    """Between the check of the fence and the commit nobody can requeue the job."""
    expire(bind, job.id)
    with transaction(bind) as session:
        runs.add_event(session, job.id, run.attempt, "in time")
        with transaction(bind) as sweeper:
            assert runs.requeue_expired(sweeper) == []
    with transaction(bind) as sweeper:
        assert runs.requeue_expired(sweeper) == [job.id]


def test_renewing_extends_the_lease_and_tells_what_is_wanted(bind: Engine, job: Job, run: ClaimedJob) -> None:
    expire(bind, job.id)
    with transaction(bind) as session:
        assert runs.renew(session, job.id, run.attempt, LEASE_SECONDS) is Desired.RUN
        assert runs.requeue_expired(session) == []
        jobs.request(session, job.id, "pause")
        assert runs.renew(session, job.id, run.attempt, LEASE_SECONDS) is Desired.PAUSE
        jobs.request(session, job.id, "cancel")
        assert runs.renew(session, job.id, run.attempt, LEASE_SECONDS) is Desired.CANCEL


def test_metrics_are_kept_and_move_the_progress(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        runs.record_metrics(session, job.id, run.attempt, [metric(1, peak_bytes=900), metric(2, peak_bytes=800)])
        runs.record_evaluation(session, job.id, run.attempt, 2, 3.5)
        runs.record_metrics(session, job.id, run.attempt, [metric(3, loss=float("nan"), grad_norm=float("inf"))])
        runs.record_metrics(session, job.id, run.attempt, [])
    row = state(bind, job.id)
    assert (row.step, row.tokens, row.loss, row.step_seconds) == (3, 384, None, 0.25)
    assert row.measured_peak_bytes == 300_000_003
    with transaction(bind) as session:
        rows, _ = metrics.page(session, job.id)
        assert [(each.step, each.loss, each.validation_loss) for each in rows] == [
            (1, 4.9, None),
            (2, 4.8, 3.5),
            (3, None, None),
        ]
        assert [each.step for each in metrics.page(session, job.id, after_step=1, limit=1)[0]] == [2]
        assert metrics.page(session, job.id, after_step=1, limit=1)[1]


def test_the_measured_peak_never_falls(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        runs.record_metrics(session, job.id, run.attempt, [metric(1, peak_bytes=900)])
        runs.record_metrics(session, job.id, run.attempt, [metric(2, peak_bytes=700)])
        runs.record_metrics(session, job.id, run.attempt, [metric(3, peak_bytes=None)])
    assert state(bind, job.id).measured_peak_bytes == 900


def test_a_repeated_step_replaces_the_row_and_keeps_its_evaluation(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        runs.record_metrics(session, job.id, run.attempt, [metric(1, loss=9.0), metric(1, loss=8.0)])
        runs.record_evaluation(session, job.id, run.attempt, 1, 7.0)
        runs.record_metrics(session, job.id, run.attempt, [metric(1, loss=6.0)])
        (row,) = metrics.page(session, job.id)[0]
        assert (row.loss, row.validation_loss) == (6.0, 7.0)


def test_hostile_text_from_a_trainer_is_stored_clean(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        data = {"message": "a\0b\ud800", "loss": float("nan"), "nested": [{"x": float("inf")}]}
        runs.add_event(session, job.id, run.attempt, "odd", data)
        error = {"code": "crashed", "message": "\0"}
        runs.finish(session, job.id, run.attempt, "failed", error=error)
    with transaction(bind) as session:
        event = events.page(session, job.id)[0][-2]
        assert event.data == {"message": "a\ufffdb\ufffd\ufffd\ufffd", "loss": None, "nested": [{"x": None}]}
    assert state(bind, job.id).error == {"code": "crashed", "message": "\ufffd"}


def test_success_makes_the_newest_checkpoint_a_model(bind: Engine, storage: Storage, job: Job, run: ClaimedJob) -> None:
    with transaction(bind) as session:
        add_checkpoint(session, storage, run, 5)
        add_checkpoint(session, storage, run, 10)
        ended = runs.finish(session, job.id, run.attempt, "succeeded")
        assert (ended.status, ended.lease_until, ended.worker) == ("succeeded", None, None)
        assert ended.finished_at is not None
        row = session.execute(text("SELECT id, job_id, step, path FROM models")).one()
    assert row == (ended.output_model_id, job.id, 10, f"jobs/{job.id}/checkpoints/attempt-0001/step-00000010")
    assert log(bind, job.id)[-1] == (1, "succeeded")


def test_success_without_a_checkpoint_is_a_mistake_of_the_caller(bind: Engine, job: Job, run: ClaimedJob) -> None:
    with pytest.raises(ValueError, match="output_model"), transaction(bind) as session:
        runs.finish(session, job.id, run.attempt, "succeeded")
    assert state(bind, job.id).status == "running"


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_run_cannot_finish_as_something_else(bind: Engine, job: Job, run: ClaimedJob, status: str) -> None:
    with pytest.raises(ValueError, match="cannot finish"), transaction(bind) as session:
        runs.finish(session, job.id, run.attempt, status)


@pytest.mark.parametrize(
    ("actions", "outcome"),
    [
        (["pause"], "paused"),
        (["pause", "resume"], "queued"),
        (["pause", "cancel"], "cancelled"),
        (["cancel"], "cancelled"),
    ],
)
def test_where_a_paused_trainer_comes_to_rest(
    bind: Engine, job: Job, run: ClaimedJob, actions: list[Any], outcome: str
) -> None:
    with transaction(bind) as session:
        for action in actions:
            jobs.request(session, job.id, action)
        assert runs.finish(session, job.id, run.attempt, "paused").status == outcome
    row = state(bind, job.id)
    assert (row.status, row.lease_until) == (outcome, None)
    assert (row.finished_at is not None) == (outcome == "cancelled")


def test_three_crashes_in_a_row_without_progress_fail_the_job(bind: Engine, job: Job) -> None:
    cause = {"code": "crashed", "message": "segmentation fault", "hint": "none"}
    for number in (1, 2, 3):
        claimed = claim(bind, job.id)
        assert claimed.failures == number - 1
        with transaction(bind) as session:
            runs.release(session, job.id, claimed.attempt, "crashed", progressed=False, error=cause)
    row = state(bind, job.id)
    assert row.status == "failed"
    assert row.error is not None
    assert row.error["code"] == "attempts_exhausted"
    assert "segmentation fault" in row.error["message"]
    assert row.error["cause"] == cause
    assert [kind for _, kind in log(bind, job.id)[2:]] == ["started", "requeued"] * 2 + ["started", "failed"]


def test_a_full_disk_pauses_the_job_until_somebody_resumes_it(bind: Engine, job: Job) -> None:
    cause = job_error("disk_full", "no space left", 0)
    crash = job_error("trainer_crashed", "segmentation fault", 0)
    for error in (crash, crash, cause):  # the last one is no failure of the job's, nor would more of them be
        claimed = claim(bind, job.id)
        with transaction(bind) as session:
            runs.release(session, job.id, claimed.attempt, error["code"], progressed=False, error=error)
    row = state(bind, job.id)
    assert (row.status, row.desired, row.failures) == ("paused", "pause", 2)
    assert row.error == cause
    assert "resume the job" in cause["hint"]
    with transaction(bind) as session:
        resumed = jobs.request(session, job.id, "resume")
    assert (resumed.status, resumed.failures, resumed.error) == ("queued", 0, None)
    assert [kind for _, kind in log(bind, job.id)[-3:]] == ["started", "paused", "resumed"]


@pytest.mark.parametrize(
    ("before", "after", "status", "code"),
    [
        ("cancel", None, "cancelled", None),
        ("pause", None, "paused", "disk_full"),  # there is no checkpoint of this pause, and the user must hear of it
        (None, "cancel", "cancelled", None),
    ],
)
def test_a_full_disk_and_what_the_user_wants(
    bind: Engine, job: Job, before: Action | None, after: Action | None, status: str, code: str | None
) -> None:
    claimed = claim(bind, job.id)
    with transaction(bind) as session:
        if before is not None:
            jobs.request(session, job.id, before)
        error = job_error("disk_full", "no space left", 0)
        runs.release(session, job.id, claimed.attempt, "disk_full", progressed=False, error=error)
    with transaction(bind) as session:
        if after is not None:
            jobs.request(session, job.id, after)
    row = state(bind, job.id)
    assert (row.status, (row.error or {}).get("code")) == (status, code)


def test_progress_starts_the_count_of_failures_again(bind: Engine, storage: Storage, job: Job) -> None:
    for number in range(1, 6):
        claimed = claim(bind, job.id)
        with transaction(bind) as session:
            add_checkpoint(session, storage, claimed, number)
            runs.release(session, job.id, claimed.attempt, "crashed", progressed=False)
    row = state(bind, job.id)
    assert (row.status, row.failures) == ("queued", 1)
    claimed = claim(bind, job.id)
    with transaction(bind) as session:
        assert runs.release(session, job.id, claimed.attempt, "drained", progressed=True).failures == 0


def test_a_memory_replan_is_no_failure(bind: Engine, job: Job) -> None:
    for number in range(1, 6):
        claimed = claim(bind, job.id)
        plan = {**PLAN, "chunk_length": 64 // number, "predicted_peak_bytes": 400_000_000 - number}
        with transaction(bind) as session:
            runs.release(session, job.id, claimed.attempt, "memory_cap_exceeded", progressed=False, plan=plan)
    row = state(bind, job.id)
    assert (row.status, row.failures, row.memory_replans) == ("queued", 0, 5)
    assert (row.plan["chunk_length"], row.predicted_peak_bytes) == (12, 399_999_995)


@pytest.mark.parametrize(("action", "outcome"), [("cancel", "cancelled"), ("pause", "paused")])
def test_releasing_honours_what_the_user_asked(
    bind: Engine, job: Job, run: ClaimedJob, action: Any, outcome: str
) -> None:
    with transaction(bind) as session:
        jobs.request(session, job.id, action)
        assert runs.release(session, job.id, run.attempt, "crashed", progressed=False).status == outcome


def test_only_expired_leases_are_taken_back(bind: Engine, storage: Storage, job: Job, run: ClaimedJob) -> None:
    other = claim(bind, add_job(bind, job.dataset_id).id)
    expire(bind, job.id)
    with transaction(bind) as session:
        assert runs.requeue_expired(session) == [job.id]
        assert runs.requeue_expired(session) == []
    row = state(bind, job.id)
    assert (row.status, row.failures, row.lease_until, row.worker) == ("queued", 1, None, None)
    assert state(bind, other.id).status == "running"
    assert log(bind, job.id)[-1] == (1, "requeued")
    assert claim(bind, job.id, "worker-2").attempt == 2


@pytest.mark.parametrize(("action", "outcome"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_lost_worker_does_not_lose_a_request(
    bind: Engine, job: Job, run: ClaimedJob, action: Any, outcome: str
) -> None:
    with transaction(bind) as session:
        jobs.request(session, job.id, action)
    expire(bind, job.id)
    with transaction(bind) as session:
        assert runs.requeue_expired(session) == []
    assert state(bind, job.id).status == outcome


def test_a_job_that_loses_every_worker_ends(bind: Engine, storage: Storage, job: Job) -> None:
    claimed = claim(bind, job.id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, claimed, 1)
    for _ in range(20):
        expire(bind, job.id)
        with transaction(bind) as session:
            if runs.requeue_expired(session) == []:
                break
        claim(bind, job.id)
    row = state(bind, job.id)
    assert row.status == "failed"
    assert row.attempt == 1 + runs.MAX_LOST_LEASES  # the first one had made progress
    assert row.error is not None
    assert row.error["cause"]["code"] == "worker_lost"
