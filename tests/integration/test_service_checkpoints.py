"""Checkpoints as rows, and the models that they become."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine

from service import base_models, checkpoints, deletions, jobs, runs
from service.database import transaction
from service.errors import ModelInUseError, NotFoundError
from service.models import Job
from service.storage import Storage
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim, write_checkpoint


def steps(bind: Engine, job_id: str) -> list[int]:
    with transaction(bind) as session:
        return [row.step for row in checkpoints.page(session, job_id)]


def test_the_newest_two_and_the_best_are_kept(bind: Engine, storage: Storage, job: Job) -> None:
    run = claim(bind, job.id)
    superseded = []
    with transaction(bind) as session:
        for step, loss in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 4.5), (5, float("nan"))):
            superseded.append(add_checkpoint(session, storage, run, step, loss))
        folders = [f"{run.checkpoints_dir}/step-{step:08d}" for step in range(6)]
        assert superseded == [[], [], [folders[1]], [], [folders[3]]]
        assert checkpoints.get(session, job, "best").step == 2
        assert checkpoints.get(session, job, "latest").step == 5
        superseded.append(add_checkpoint(session, storage, run, 6, 2.0))
        assert set(superseded[-1]) == {folders[2], folders[4]}  # the former best is one of many now
    assert steps(bind, job.id) == [6, 5]


def test_keep_is_the_jobs_own(bind: Engine, storage: Storage) -> None:
    job = add_job(bind, add_dataset(bind, storage).id, keep=4)
    run = claim(bind, job.id)
    with transaction(bind) as session:
        removed = [add_checkpoint(session, storage, run, step) for step in range(1, 7)]
    assert steps(bind, job.id) == [6, 5, 4, 3]
    assert list(map(len, removed)) == [0, 0, 0, 0, 1, 1]


def test_a_step_that_is_registered_again_replaces_its_row(bind: Engine, storage: Storage, job: Job) -> None:
    first = claim(bind, job.id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, first, 3)
        runs.release(session, job.id, first.attempt, "crashed", progressed=True)
    second = claim(bind, job.id)
    path = f"{second.checkpoints_dir}/step-00000003"
    with transaction(bind) as session:
        replaced = checkpoints.register(session, job.id, second.attempt, 3, files=[], path=path)
        assert replaced == [f"{first.checkpoints_dir}/step-00000003"]
        again = checkpoints.register(session, job.id, second.attempt, 3, files=[], path=path)
        assert again == []  # the folder is the new one's
        (row,) = checkpoints.page(session, job.id)
        assert (row.attempt, row.files) == (second.attempt, [])


def test_later_steps_that_could_not_be_resumed_from_give_way(bind: Engine, storage: Storage, job: Job) -> None:
    """Otherwise a checkpoint after a damaged one would be the oldest, and deleted as soon as it is written."""
    first = claim(bind, job.id)
    with transaction(bind) as session:
        for step in (20, 30):
            add_checkpoint(session, storage, first, step)
        runs.release(session, job.id, first.attempt, "crashed", progressed=True)
    second = claim(bind, job.id)
    with transaction(bind) as session:
        superseded = add_checkpoint(session, storage, second, 10)
    assert superseded == [f"{first.checkpoints_dir}/step-000000{step}" for step in (20, 30)]
    assert steps(bind, job.id) == [10]


def test_checkpoints_are_found_by_step_or_name(bind: Engine, storage: Storage, job: Job) -> None:
    run = claim(bind, job.id)
    with transaction(bind) as session:
        for which in ("latest", "best", "final", "3"):
            with pytest.raises(NotFoundError):
                checkpoints.get(session, job, which)
        add_checkpoint(session, storage, run, 3)
        assert checkpoints.get(session, job, "3").step == 3
        for which in ("final", "best", "4", "-3", "+3", " 3", "3.0", "\u0663", "9" * 30, "", "../3", "none"):
            with pytest.raises(NotFoundError):
                checkpoints.get(session, job, which)
        ended = runs.finish(session, job.id, run.attempt, "succeeded")
        found = checkpoints.get(session, ended, "final")
        assert found.step == 3
        assert checkpoints.file_of(found, "config.json")["bytes"] > 0
        for name in ("../config.json", "config", "", "config.json\0"):
            with pytest.raises(NotFoundError):
                checkpoints.file_of(found, name)


def test_final_is_the_output_and_never_another_checkpoint(bind: Engine, storage: Storage, job: Job) -> None:
    run = claim(bind, job.id)
    with transaction(bind) as session:
        for step in (2, 4):
            add_checkpoint(session, storage, run, step)
        ended = runs.finish(session, job.id, run.attempt, "succeeded")
        assert checkpoints.get(session, ended, "final").step == 4
        assert ended.output_model_id is not None
        deletions.delete_model(session, ended.output_model_id)
    with transaction(bind) as session:
        left = jobs.get(session, job.id)
        assert checkpoints.get(session, left, "latest").step == 2
        with pytest.raises(NotFoundError):
            checkpoints.get(session, left, "final")


def test_a_model_is_kept_while_an_unfinished_job_starts_from_it(bind: Engine, storage: Storage, job: Job) -> None:
    run = claim(bind, job.id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, run, 1)
        model_id = runs.finish(session, job.id, run.attempt, "succeeded").output_model_id
        assert model_id is not None
        second = jobs.create(
            session,
            spec={"model": model_id},
            train=job.train,
            model_config=job.model_config,
            plan=job.plan,
            memory_cap_bytes=1,
            dataset_id=job.dataset_id,
            base_model_id=model_id,
        )
    claimed = claim(bind, second.id)
    assert claimed.initial_weights_path == f"jobs/{job.id}/checkpoints/attempt-0001/step-00000001"
    with transaction(bind) as session, pytest.raises(ModelInUseError) as caught:
        deletions.delete_model(session, model_id)
    assert caught.value.fields["jobs"] == [second.id]
    with transaction(bind) as session:
        runs.finish(session, second.id, claimed.attempt, "cancelled")
        assert deletions.delete_model(session, model_id) == claimed.initial_weights_path
        assert base_models.page(session) == ([], False)
        assert jobs.get(session, job.id).output_model_id is None
        with pytest.raises(NotFoundError):
            base_models.get(session, model_id)
    assert steps(bind, job.id) == []


def test_a_job_from_a_model_that_is_gone_is_not_created(bind: Engine, storage: Storage, job: Job) -> None:
    write_checkpoint(storage, claim(bind, job.id), 1)
    with pytest.raises(NotFoundError), transaction(bind) as session:
        jobs.create(
            session,
            spec={"model": "model_" + "0" * 32},
            train=job.train,
            model_config=job.model_config,
            plan=job.plan,
            memory_cap_bytes=1,
            dataset_id=job.dataset_id,
            base_model_id="model_" + "0" * 32,
        )
