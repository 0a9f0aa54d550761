"""The user's side of a job: creation, pages, cancel, pause, resume."""

from __future__ import annotations

import itertools
import threading
from contextlib import ExitStack
from typing import Any, get_args

import pytest
import sqlalchemy.exc
from sqlalchemy import Engine, text

from cli.embedded import EmbeddedServers
from service import calibrations, database, datasets, events, jobs, runs
from service.database import transaction
from service.errors import DatasetInUseError, JobStateConflictError, NotFoundError
from service.ids import new_id
from service.models import Job
from service.status import REQUESTS, TERMINAL, Action, Desired, JobStatus
from service.storage import Storage
from tests.integration.seed import add_dataset, add_job, claim, metric


def force(bind: Engine, job_id: str, status: JobStatus, desired: Desired) -> None:
    """Put a fresh job into any state, past the guards."""
    lease = "now() + interval '1 minute'" if status is JobStatus.RUNNING else "NULL"
    statement = f"UPDATE jobs SET status = :status, desired = :desired, lease_until = {lease} WHERE id = :id"
    with transaction(bind) as session:
        session.execute(text(statement), {"status": status.value, "desired": desired.value, "id": job_id})


def test_what_is_shown_of_a_job_is_the_job_and_its_tenants_alone(bind: Engine, job: Job) -> None:
    """`look` asks past the ORM, so no session restricts it."""
    with transaction(bind) as session:
        stored = jobs.get(session, job.id)
        mine = (stored.tenant, job.id)
        found = jobs.look(bind, [("another", job.id), mine, (stored.tenant, new_id("job")), (stored.tenant, "job")])
        assert list(found) == [mine]
        assert {name: getattr(stored, name) for name in found[mine]._fields} == found[mine]._asdict()


def test_connections_that_the_server_has_closed_are_replaced_before_anybody_has_one(
    bind: Engine, servers: EmbeddedServers, job: Job
) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(transaction(bind)).execute(text("SELECT 1"))
    name = bind.url.database
    with servers.connect() as operator:
        operator.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", (name,))
    for _ in range(3):
        assert list(jobs.look(bind, [("default", job.id)])) == [("default", job.id)]


def event_types(bind: Engine, job_id: str) -> list[str]:
    with transaction(bind) as session:
        return [event.type for event in events.page(session, job_id)[0]]


def test_a_new_job_is_queued_with_its_plan_and_events(bind: Engine, job: Job) -> None:
    with transaction(bind) as session:
        stored = jobs.get(session, job.id)
        assert (stored.status, stored.desired, stored.attempt, stored.total_steps) == ("queued", "run", 0, 10)
        assert stored.predicted_peak_bytes == stored.plan["predicted_peak_bytes"] == 400_000_000
        assert jobs.queued_ids(session) == [job.id]
    assert event_types(bind, job.id) == ["queued", "planned"]


def test_a_job_on_a_dataset_that_is_gone_is_not_created(bind: Engine) -> None:
    missing = new_id("ds")
    with pytest.raises(NotFoundError):
        add_job(bind, missing)
    with transaction(bind) as session:
        assert jobs.page(session) == ([], False)


def test_pages_are_newest_first_and_complete(bind: Engine, storage: Storage) -> None:
    dataset = add_dataset(bind, storage)
    created = [add_job(bind, dataset.id).id for _ in range(7)]
    seen: list[str] = []
    with transaction(bind) as session:
        jobs.request(session, created[3], "pause")
        more = True
        while more:
            rows, more = jobs.page(session, after=seen[-1] if seen else None, limit=3)
            seen += [row.id for row in rows]
        assert seen == created[::-1]
        assert jobs.page(session, limit=7)[1] is False
        assert [row.id for row in jobs.page(session, status="paused")[0]] == [created[3]]
        assert jobs.queued_ids(session, limit=2) == created[:2]


@pytest.mark.parametrize("job_id", ["", "x", "job_" + "0" * 32, "job_\0", "ds_" + "0" * 32])
def test_an_unknown_job_is_not_found(bind: Engine, job_id: str) -> None:
    with transaction(bind) as session:
        with pytest.raises(NotFoundError):
            jobs.get(session, job_id)
        with pytest.raises(NotFoundError):
            jobs.request(session, job_id, "cancel")


def test_every_request_in_every_state_does_what_the_table_says(bind: Engine, storage: Storage) -> None:
    dataset = add_dataset(bind, storage)
    for action, status, desired in itertools.product(get_args(Action), JobStatus, Desired):
        job = add_job(bind, dataset.id)
        force(bind, job.id, status, desired)
        outcome = REQUESTS.get((action, status, desired))
        with transaction(bind) as session:
            if outcome is None:
                with pytest.raises(JobStateConflictError):
                    jobs.request(session, job.id, action)
                continue
            after = jobs.request(session, job.id, action)
            again = jobs.request(session, job.id, action)
        assert (after.status, after.desired) == outcome
        assert (again.status, again.desired) == outcome
        assert (after.finished_at is not None) == (status not in TERMINAL and outcome[0] in TERMINAL)
        logged = event_types(bind, job.id)[2:]
        assert len(logged) == (0 if outcome == (status, desired) else 1), (action, status, desired, logged)


def test_the_events_of_requests_say_what_happened(bind: Engine, job: Job) -> None:
    steps: list[Action] = ["pause", "pause", "resume", "cancel"]
    for action in steps:
        with transaction(bind) as session:
            jobs.request(session, job.id, action)
    assert event_types(bind, job.id)[2:] == ["paused", "resumed", "cancelled"]


def test_resuming_gives_a_paused_job_its_attempts_back(bind: Engine, job: Job) -> None:
    claimed = claim(bind, job.id)
    with transaction(bind) as session:
        runs.release(session, job.id, claimed.attempt, "crashed", progressed=False)
        jobs.request(session, job.id, "pause")
        assert jobs.get(session, job.id).failures == 1
        assert jobs.request(session, job.id, "resume").failures == 0


@pytest.mark.parametrize("terminal", sorted(TERMINAL))
def test_the_database_itself_refuses_to_leave_a_terminal_state(bind: Engine, job: Job, terminal: JobStatus) -> None:
    force(bind, job.id, terminal, Desired.RUN)
    for status in set(JobStatus) - {terminal}:
        with pytest.raises(sqlalchemy.exc.IntegrityError, match="which is final"):
            force(bind, job.id, status, Desired.RUN)
    with transaction(bind) as session:
        session.execute(text("UPDATE jobs SET output_model_id = NULL"))  # other columns may change
        assert jobs.get(session, job.id).status == terminal


@pytest.mark.parametrize(
    "change", ["status = 'lost'", "desired = 'explode'", "status = 'running'", "lease_until = now()"]
)
def test_the_database_itself_refuses_impossible_rows(bind: Engine, job: Job, change: str) -> None:
    with pytest.raises(sqlalchemy.exc.IntegrityError), transaction(bind) as session:
        session.execute(text(f"UPDATE jobs SET {change}"))


def test_a_dataset_is_kept_while_an_unfinished_job_reads_it(bind: Engine, storage: Storage, job: Job) -> None:
    with transaction(bind) as session, pytest.raises(DatasetInUseError) as caught:
        datasets.delete(session, job.dataset_id)
    assert caught.value.fields["jobs"] == [job.id]
    with transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
        assert datasets.delete(session, job.dataset_id) == f"datasets/{job.dataset_id}"
    with transaction(bind) as session:
        assert jobs.get(session, job.id).dataset_id == job.dataset_id  # what it was trained on stays on record


def test_a_dataset_cannot_vanish_under_a_job_that_is_being_created(bind: Engine, storage: Storage) -> None:
    dataset = add_dataset(bind, storage)
    outcome: list[object] = []

    def delete() -> None:
        try:
            with transaction(bind) as session:
                outcome.append(datasets.delete(session, dataset.id))
        except DatasetInUseError as error:
            outcome.append(error)

    with transaction(bind) as session:
        datasets.get(session, dataset.id, keep=True)  # what jobs.create does first
        thread = threading.Thread(target=delete)
        thread.start()
        thread.join(0.3)
        assert outcome == []  # the deletion waits for this transaction
        with transaction(bind) as other:  # while other jobs may still be created
            datasets.get(other, dataset.id, keep=True)
        add_job(bind, dataset.id)
    thread.join(5)
    assert isinstance(outcome[0], DatasetInUseError)


def test_calibrations_replace_each_other_and_are_counted(bind: Engine) -> None:
    with transaction(bind) as session:
        assert calibrations.current(session) is None
        assert calibrations.store(session, "cpu", "w1", {"rate": 1.0}) == 1
        assert calibrations.store(session, "cpu", "w2", {"rate": float("nan")}) == 2
    with transaction(bind) as session:
        assert calibrations.current(session) == {"rate": None}
        assert calibrations.store(session, "cuda", "w2", {"rate": 3.0}) == 1
    with transaction(bind) as session:
        assert calibrations.current(session) == {"rate": 3.0}
        assert calibrations.store(session, "cpu", "w1", {"rate": 4.0}) == 3
    with transaction(bind) as session:
        assert calibrations.current(session) == {"rate": 4.0}


def finished_with(bind: Engine, dataset_id: str, seconds: list[float], **train: Any) -> Job:
    """A job whose steps took this long, claimed and not yet finished; its plan says 0.5 s."""
    job = add_job(bind, dataset_id)
    run = claim(bind, job.id)
    rows = [metric(step, step_seconds=value) for step, value in enumerate(seconds, 1)]
    with transaction(bind) as session:
        runs.record_metrics(session, job.id, run.attempt, rows)
        held = runs.hold(session, job.id, run.attempt)
        held.train = held.train | train
        calibrations.learn(session, held)
    return job


def test_finished_jobs_teach_the_times_of_their_model(bind: Engine, job: Job) -> None:
    """The median of a job's steps but the first over 0.5 s; the mean over jobs is that of logarithms."""

    def factor(**train: Any) -> float | None:
        with transaction(bind) as session:
            data = calibrations.for_job(session, job.model_config, job.train | train)
        assert data is not None
        return data.get("time_factor")

    finished_with(bind, job.dataset_id, [1.0] * 5)  # no calibration yet: nothing to correct
    with transaction(bind) as session:
        assert calibrations.for_job(session, job.model_config, job.train) is None
        calibrations.store(session, "cpu", "w1", {"device": "cpu", "source": "measured"})
    assert factor() is None
    with transaction(bind) as session:  # not what the job was planned with
        calibrations.store(session, "cpu", "w1", {"device": "cpu", "source": "another"})
    finished_with(bind, job.dataset_id, [9.0, 1.0, 1.0, 4.0])
    with transaction(bind) as session:
        calibrations.store(session, "cpu", "w1", {"device": "cpu", "source": "measured"})
    assert factor() is None
    finished_with(bind, job.dataset_id, [9.0, 1.0, 1.0])  # too few
    finished_with(bind, job.dataset_id, [9.0, 500.0, 500.0, 500.0])  # no property of a model
    assert factor() is None
    finished_with(bind, job.dataset_id, [9.0, 1.0, 1.0, 4.0])
    assert factor() == pytest.approx(2.0)
    finished_with(bind, job.dataset_id, [9.0, 0.5, 0.5, 0.5])
    assert factor() == pytest.approx(2.0**0.5)
    assert factor(precision="bfloat16") is None
    finished_with(bind, job.dataset_id, [9.0, 2.0, 2.0, 2.0], precision="bfloat16")
    assert factor(precision="bfloat16") == pytest.approx(4.0)
    assert factor() == pytest.approx(2.0**0.5)
    with transaction(bind) as session:
        data = calibrations.for_job(session, job.model_config, job.train)
    assert data is not None
    assert data["source"] == "measured; times learned from 2 finished jobs of this model"


def test_one_holder_of_an_advisory_lock_at_a_time(bind: Engine) -> None:
    with transaction(bind) as first, transaction(bind) as second:
        assert database.try_lock(first, 42)
        assert not database.try_lock(second, 42)
        assert database.try_lock(second, 43)
    with transaction(bind) as third:
        assert database.try_lock(third, 42)


def test_a_transaction_that_fails_leaves_nothing(bind: Engine, job: Job) -> None:
    with pytest.raises(RuntimeError), transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
        raise RuntimeError
    with transaction(bind) as session:
        assert jobs.get(session, job.id).status == "queued"
    assert event_types(bind, job.id) == ["queued", "planned"]
