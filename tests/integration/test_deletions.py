"""Jobs and checkpoints are deleted, by request and by age: rows and files, both or neither."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, func, insert, select, text, update
from starlette.testclient import TestClient

from service import checkpoints, database, deletions, jobs, prune_program, retention, runs, telemetry, uploads, webhooks
from service.models import Checkpoint, IdempotencyKey, Job, JobEvent, Metric, Model, WebhookDelivery
from service.runs import ClaimedJob
from service.settings import Settings
from service.storage import Storage
from service.webhook_urls import Allowed
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim, metric

ADDRESS = "https://hooks.example.com/"
Finish = Callable[..., tuple[str, str | None]]


@pytest.fixture
def finish(bind: Engine, storage: Storage) -> Finish:
    """A job that ran over these steps with a checkpoint after each: its id, and its output's."""

    def run(*steps: int, status: str = "succeeded", losses: dict[int, float] | None = None) -> tuple[str, str | None]:
        claimed = start(bind, storage)
        with database.transaction(bind) as session:
            for step in steps:
                add_checkpoint(session, storage, claimed, step, (losses or {}).get(step))
            return claimed.id, runs.finish(session, claimed.id, claimed.attempt, status).output_model_id

    return run


def start(bind: Engine, storage: Storage, **spec: Any) -> ClaimedJob:
    return claim(bind, add_job(bind, add_dataset(bind, storage).id, keep=9, **spec).id)


def steps_of(bind: Engine, job_id: str) -> list[int]:
    with database.transaction(bind) as session:
        return [row.step for row in checkpoints.page(session, job_id)]


def folders_of(storage: Storage, job_id: str) -> list[str]:
    return sorted(path.name for path in storage.path(f"jobs/{job_id}/checkpoints").glob("*/*"))


def count(bind: Engine, *tables: Any) -> list[int]:
    with database.transaction(bind) as session:
        return [session.scalars(select(func.count()).select_from(table)).one() for table in tables]


def grow_old(bind: Engine, days: float) -> None:
    with database.transaction(bind) as session:
        session.execute(update(Job).values(finished_at=Job.finished_at - timedelta(days=days)))


def forget(storage: Storage) -> None:
    """An hour passes."""
    for path in storage.path("doubtful").iterdir():
        os.utime(path, times=(time.time() - 3_700,) * 2)


def test_a_job_goes_with_all_that_it_left(client: TestClient, bind: Engine, storage: Storage, finish: Finish) -> None:
    with database.transaction(bind, "default") as session:
        webhooks.create(session, Allowed.parse(ADDRESS), url=ADDRESS)
    job_id, model = finish(1, 2)
    storage.path(f"jobs/{job_id}/attempt-1.stderr").write_text("a log")
    assert client.get(f"/v1/files/result_{job_id.removeprefix('job_')}_metrics/content").status_code == 200
    key = {"tenant": "default", "key": "k", "request_sha256": "0", "job_id": job_id, "answer": "{}"}
    with database.transaction(bind) as session:
        session.execute(insert(IdempotencyKey).values(key))
    assert count(bind, Job, Checkpoint, Model, WebhookDelivery) == [1, 2, 1, 1]
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert count(bind, Job, JobEvent, Metric, Checkpoint, Model, WebhookDelivery) == [0] * 6
    assert count(bind, IdempotencyKey) == [1]
    assert not storage.path(f"jobs/{job_id}").exists()
    assert storage.doubtful(-1) == []
    assert (
        client.delete("/jobs/job_%00").status_code
        == client.delete(f"/jobs/{job_id}/checkpoints/%00").status_code
        == 404
    )
    assert client.get(f"/models/{model}").status_code == client.delete(f"/jobs/{job_id}").status_code == 404


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_a_job_that_is_not_over_stays(
    client: TestClient, bind: Engine, job: Job, storage: Storage, status: str
) -> None:
    if status == "running":
        claim(bind, job.id)
    elif status == "paused":
        with database.transaction(bind) as session:
            jobs.request(session, job.id, "pause")
    answer = client.delete(f"/jobs/{job.id}")
    assert (answer.status_code, answer.json()["code"], answer.json()["job_status"]) == (409, "job_unfinished", status)
    assert "/cancel" in answer.json()["hint"]
    with database.transaction(bind) as session:
        assert jobs.get(session, job.id).status == status


def test_where_the_output_goes_the_best_is_another(client: TestClient, bind: Engine, finish: Finish) -> None:
    job_id, model = finish(1, 2, 3, losses={1: 2.0, 2: 1.5, 3: 1.0})
    assert client.get(f"/jobs/{job_id}/checkpoints/best").json()["step"] == 3
    assert client.delete(f"/models/{model}").status_code == 204
    assert steps_of(bind, job_id) == [2, 1]
    assert client.get(f"/jobs/{job_id}/checkpoints/best").json()["step"] == 2


def test_a_long_curve_has_time_to_go(bind: Engine, finish: Finish) -> None:
    job_id, _ = finish(1)
    slow = (
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.3); RETURN OLD; END $$"
    )
    with bind.begin() as connection:
        connection.execute(text(slow))
        connection.execute(
            text("CREATE TRIGGER slow BEFORE DELETE ON checkpoints FOR EACH ROW EXECUTE FUNCTION slow()")
        )
    with database.transaction(bind) as session:
        session.execute(text("SET LOCAL statement_timeout = 100"))
        deletions.delete_job(session, job_id)
    assert count(bind, Job) == [0]


def test_an_output_that_others_start_from_keeps_its_job(
    client: TestClient, bind: Engine, storage: Storage, settings: Settings, finish: Finish
) -> None:
    job_id, model = finish(1)
    other = add_job(bind, add_dataset(bind, storage).id)
    with database.transaction(bind) as session:
        session.execute(update(Job).where(Job.id == other.id).values(base_model_id=model))
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"], answer.json()["jobs"]) == (409, "model_in_use", [other.id])
    assert folders_of(storage, job_id) == ["step-00000001"]
    grow_old(bind, 10)
    by_age = settings.model_copy(update={"keep_jobs_days": 5.0})
    assert retention.prune(bind, storage, by_age).jobs == 0
    with database.transaction(bind) as session:
        jobs.request(session, other.id, "cancel")
    assert client.delete(f"/jobs/{job_id}").status_code == 204


def test_what_counts_attempts_never_falls(client: TestClient, bind: Engine, storage: Storage) -> None:
    def given_back() -> dict[str, int]:
        with database.transaction(bind) as session:
            return telemetry.snapshot(session).given_back

    for expected in (1, 2):
        claimed = start(bind, storage)
        with database.transaction(bind) as session:
            runs.release(session, claimed.id, claimed.attempt, "worker_shutdown", progressed=True)
            jobs.request(session, claimed.id, "cancel")
        assert given_back() == {"worker_shutdown": expected}
        assert client.delete(f"/jobs/{claimed.id}").status_code == 204
        assert given_back() == {"worker_shutdown": expected}


def test_a_checkpoint_goes_unless_it_is_needed(
    client: TestClient, bind: Engine, storage: Storage, finish: Finish
) -> None:
    claimed = start(bind, storage)
    with database.transaction(bind) as session:
        for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
            add_checkpoint(session, storage, claimed, step, loss)
    url = f"/jobs/{claimed.id}/checkpoints"
    needed = client.delete(f"{url}/3")
    assert (needed.status_code, needed.json()["code"], needed.json()["model"]) == (409, "checkpoint_in_use", None)
    assert client.delete(f"{url}/best").status_code == 422
    assert client.delete(f"{url}/2").status_code == 204
    assert client.delete(f"{url}/2").status_code == 404
    assert client.get(f"{url}/best").json()["step"] == 1
    assert folders_of(storage, claimed.id) == ["step-00000001", "step-00000003"]
    with database.transaction(bind) as session:
        runs.finish(session, claimed.id, claimed.attempt, "cancelled")
    assert client.delete(f"{url}/3").status_code == 204
    done, model = finish(1, 2)
    output = client.delete(f"/jobs/{done}/checkpoints/2").json()
    assert (output["code"], output["model"]) == ("checkpoint_in_use", model)
    assert client.delete(f"/jobs/{done}/checkpoints/1").status_code == 204
    assert steps_of(bind, done) == [2]


@pytest.mark.parametrize("what", ["", "/checkpoints/1"])
def test_files_of_a_process_that_died_after_the_commit_go_later(
    client: TestClient, bind: Engine, storage: Storage, finish: Finish, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    job_id, _ = finish(1, 2)
    kept, _ = finish(1)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove", lambda *_: None)  # the process died
        assert client.delete(f"/jobs/{job_id}{what}").status_code == 204
    assert folders_of(storage, job_id) == ["step-00000001", "step-00000002"]
    storage.doubt(f"jobs/{kept}")  # and one died before its commit
    assert uploads.settle(bind, storage) == []
    forget(storage)
    assert len(uploads.settle(bind, storage)) == 1
    assert folders_of(storage, job_id) == (["step-00000002"] if what else [])
    assert folders_of(storage, kept) == ["step-00000001"]
    assert storage.doubtful(-1) == []


def test_during_a_backup_files_stay_and_go_later(
    client: TestClient, bind: Engine, storage: Storage, finish: Finish
) -> None:
    job_id, _ = finish(1)
    backup = storage.root / "backup-in-progress"
    backup.touch()
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    forget(storage)
    assert uploads.settle(bind, storage) == []
    assert folders_of(storage, job_id) == ["step-00000001"]
    os.utime(backup, (time.time() - 90_000,) * 2)  # forgotten
    assert uploads.settle(bind, storage) == [f"jobs/{job_id}"]
    assert not storage.path(f"jobs/{job_id}").exists()


def test_old_checkpoints_go_but_for_what_somebody_may_want(
    bind: Engine, storage: Storage, settings: Settings, finish: Finish
) -> None:
    succeeded, _ = finish(1, 2, 3, 4, losses={1: 1.0, 2: 0.5, 3: 2.0, 4: 3.0})
    failed, _ = finish(5, 6, 7, status="cancelled")
    young = settings.model_copy(update={"keep_checkpoints_days": 8.0})
    old = settings.model_copy(update={"keep_checkpoints_days": 7.0})
    grow_old(bind, 7.5)
    running = start(bind, storage)
    with database.transaction(bind) as session:
        for step in (1, 2, 3):
            add_checkpoint(session, storage, running, step)
        assert retention.due(session, old).checkpoints == 4
    assert not retention.prune(bind, storage, settings).anything
    assert not retention.prune(bind, storage, young).anything
    assert retention.prune(bind, storage, old).checkpoints == 4
    assert not retention.prune(bind, storage, old).anything
    assert (steps_of(bind, succeeded), steps_of(bind, failed), steps_of(bind, running.id)) == ([4, 2], [7], [3, 2, 1])
    assert folders_of(storage, succeeded) == ["step-00000002", "step-00000004"]


def test_old_curves_are_thinned_out_in_short_transactions(
    bind: Engine, storage: Storage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "POINTS", 10)
    monkeypatch.setattr(retention, "ROWS_AT_ONCE", 30)
    claimed = start(bind, storage, steps=95)
    with database.transaction(bind) as session:
        runs.record_metrics(session, claimed.id, claimed.attempt, [metric(step) for step in range(1, 96)])
        runs.record_evaluation(session, claimed.id, claimed.attempt, 33, 1.5)
        add_checkpoint(session, storage, claimed, 95)
        runs.finish(session, claimed.id, claimed.attempt, "succeeded")
    grow_old(bind, 2)
    by_age = settings.model_copy(update={"keep_metrics_days": 1.0})
    with bind.connect() as other, other.begin():
        assert other.scalar(select(func.pg_try_advisory_xact_lock(retention.LOCK_KEY)))
        assert not retention.prune(bind, storage, by_age).anything  # another sweeper is at it
    deleted = []
    while (done := retention.prune(bind, storage, by_age)).anything:
        deleted.append(done.metrics)
    assert deleted == [30, 30, 23]
    with database.transaction(bind) as session:
        kept = list(session.scalars(select(Metric.step).order_by(Metric.step)))
        told = list(session.scalars(select(JobEvent.type).order_by(JobEvent.id)))
    assert kept == [1, 10, 20, 30, 33, 40, 50, 60, 70, 80, 90, 95]
    assert told == ["queued", "planned", "started", "succeeded"]


def test_old_jobs_go_at_last(bind: Engine, storage: Storage, settings: Settings, finish: Finish, job: Job) -> None:
    finished = [finish(1)[0] for _ in range(3)]
    by_age = settings.model_copy(update={"keep_jobs_days": 30.0})
    grow_old(bind, 31)
    late, _ = finish(1)
    assert retention.prune(bind, storage, by_age).jobs == 3
    with database.transaction(bind) as session:
        assert sorted(session.scalars(select(Job.id))) == sorted([job.id, late])
    assert [storage.path(f"jobs/{each}").exists() for each in (*finished, late)] == [False] * 3 + [True]


def test_by_hand_all_goes_at_once_or_is_only_counted(
    bind: Engine,
    storage: Storage,
    settings: Settings,
    finish: Finish,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    by_age = settings.model_copy(update={"keep_jobs_days": 30.0, "keep_checkpoints_days": 1.0})
    monkeypatch.setattr(prune_program, "load_settings", lambda: by_age)
    monkeypatch.setattr(retention, "JOBS_AT_ONCE", 1)
    for _ in range(2):
        finish(1)
    grow_old(bind, 29)
    finish(1, 2, 3)
    grow_old(bind, 2)
    for options, rest in (["--dry-run"], [3, 5]), ([], [1, 1]):
        assert prune_program.main([*options, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["jobs"], found["checkpoints"]) == (2, 2)
        assert count(bind, Job, Checkpoint) == rest
