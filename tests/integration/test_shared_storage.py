"""Hosts with disks of their own and one object store: where a job goes on, what a store that is away costs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from api.app import create_app
from service import inventory, jobs, prune_program, runs, storage_program, uploads, verify_program
from service.database import transaction
from service.errors import StorageDeniedError, StorageUnavailableError
from service.object_storage import ObjectStorage
from service.object_store import ObjectStore
from service.result_files import ResultId
from service.runs import ClaimedJob
from service.settings import Settings
from service.storage import Storage, open_storage
from tests.integration.fake_trainer import loss_at
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim
from tests.integration.stage import Stage, open_stage, wait_for
from worker.preparer import Preparer


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    url = f"file://{tmp_path / 'bucket'}"
    with open_stage(database_url, redis_url, tmp_path, storage_url=url, storage_patience_seconds=20.0) as stage:
        yield stage


def move_to(stage: Stage, name: str) -> None:
    """What runs next runs on a host of this name, whose disk is empty."""
    stage.settings = stage.settings.model_copy(update={"data_dir": stage.settings.data_dir.parent / name})


def break_store(monkeypatch: pytest.MonkeyPatch, error: Exception, below: str) -> threading.Event:
    """Sending files fails until the event is set."""
    mended, real = threading.Event(), ObjectStore.put_file

    def put_file(self: ObjectStore, key: str, *arguments: Any) -> None:
        if key.startswith(below) and not mended.is_set():
            raise error
        real(self, key, *arguments)

    monkeypatch.setattr(ObjectStore, "put_file", put_file)
    return mended


def test_a_job_goes_on_where_there_is_nothing_of_it(stage: Stage, tmp_path: Path) -> None:
    job_id = stage.create_job(steps=12)
    assert stage.run(job_id, crash_at=7, crash_attempts=1).status == "queued"
    assert [row.step for row in stage.checkpoints(job_id)] == [5]
    move_to(stage, "b")
    assert stage.run(job_id).status == "succeeded"
    assert [start["step"] for start in stage.trace(job_id)] == [5]
    assert [row.loss for row in stage.metrics(job_id)] == [loss_at(step) for step in range(1, 13)]
    rows = {row.path for row in stage.checkpoints(job_id)}
    assert len(rows) == 2
    bucket = tmp_path / "bucket"

    def stored() -> set[str]:
        return {str(path.parent.relative_to(bucket)) for path in bucket.glob("jobs/**/state.json")}

    wait_for("removal of what was superseded", lambda: stored() == rows)


def test_a_store_that_is_away_delays_checkpoints_and_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = stage.create_job(steps=12)
    mended = break_store(monkeypatch, StorageUnavailableError("away"), "jobs/")

    def mend() -> None:
        stage.reach(job_id, 12)  # the trainer is through, and its steps are written
        assert stage.checkpoints(job_id) == []
        mended.set()

    mending = threading.Thread(target=mend)
    mending.start()
    assert stage.run(job_id).status == "succeeded"
    mending.join()
    assert [row.step for row in stage.checkpoints(job_id)] == [12, 10]
    assert stage.events(job_id, "storage_waiting") == [("storage_waiting", {"code": "storage_unavailable"})]


@pytest.mark.parametrize("error", [StorageUnavailableError("away"), StorageDeniedError("no")])
def test_a_store_that_stays_away_pauses_the_job(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, error: StorageUnavailableError
) -> None:
    stage.settings = stage.settings.model_copy(update={"storage_patience_seconds": 0.2})
    job_id = stage.create_job(steps=12)
    mended = break_store(monkeypatch, error, "jobs/")
    job = stage.run(job_id)
    assert (job.status, job.failures) == ("paused", 0)
    assert job.error is not None
    assert job.error["code"] == error.code
    assert "resume the job" in job.error["hint"]
    mended.set()
    stage.request(job_id, "resume")
    job = stage.run(job_id)
    assert (job.status, job.error) == ("succeeded", None)


def test_a_cancel_does_not_wait_for_the_store(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = stage.create_job(steps=12)
    break_store(monkeypatch, StorageUnavailableError("away"), "jobs/")

    def cancel() -> None:
        stage.reach(job_id, 12)
        stage.request(job_id, "cancel")

    cancelling = threading.Thread(target=cancel)
    cancelling.start()
    assert stage.run(job_id).status == "cancelled"
    cancelling.join()
    assert stage.events(job_id, "trainer_failed") == []


@pytest.mark.parametrize(("action", "status"), [("cancel", "cancelled"), ("pause", "paused")])
def test_what_the_user_wants_does_not_wait_for_what_a_job_is_to_go_on_from(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, action: str, status: str
) -> None:
    job_id = stage.create_job(steps=12)
    stage.run(job_id, crash_at=7, crash_attempts=1)
    move_to(stage, "b")

    def away(*_: Any) -> Any:
        raise StorageUnavailableError("away")

    monkeypatch.setattr(ObjectStore, "blocks", away)

    def ask() -> None:
        wait_for("the store to be missed", lambda: bool(stage.events(job_id, "storage_waiting")))
        stage.request(job_id, action)

    asking = threading.Thread(target=ask)
    asking.start()
    job = stage.run(job_id)
    asking.join()
    assert (job.status, job.error) == (status, None)
    assert len(stage.events(job_id, "trainer_failed")) == 1, "the store was not waited for until patience was over"


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_object_passed_over(stage: Stage, tmp_path: Path) -> None:
    job_id = stage.create_job(steps=30)
    stage.run(job_id, crash_at=12, crash_attempts=9)
    newest, before = stage.checkpoints(job_id)
    (stage.settings.data_dir / newest.path / "model.safetensors").write_bytes(b"other")
    stage.run(job_id, crash_at=13, crash_attempts=9)
    (tmp_path / "bucket" / newest.path / "model.safetensors").write_bytes(b"other")
    move_to(stage, "b")
    stage.run(job_id, crash_at=8, crash_attempts=9)
    assert stage.trace(job_id)[-1]["step"] == before.step
    damaged = stage.events(job_id, "checkpoint_damaged")
    assert [data["step"] for _, data in damaged] == [newest.step]


def test_a_checkpoint_of_a_job_that_runs_stays_in_doubt_for_as_long_as_it_takes(stage: Stage) -> None:
    storage = open_storage(stage.settings)
    claimed = claim(stage.bind, stage.create_job())
    path = f"{claimed.checkpoints_dir}/step-00000005"
    folder = storage.make_folder(path)
    (folder / "state.json").write_text("{}")
    storage.doubt(path)
    storage.publish(path)
    assert uploads.settle(stage.bind, storage, older_than_seconds=-60) == []
    stage.request(claimed.id, "cancel")
    with transaction(stage.bind) as session:
        runs.finish(session, claimed.id, claimed.attempt, "cancelled")
    assert uploads.settle(stage.bind, storage, older_than_seconds=-60) == [path]
    assert not storage.exists(path)


def test_a_host_with_a_bad_disk_takes_nothing_from_the_others(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = stage.create_job(steps=30)
    stage.run(job_id, crash_at=12, crash_attempts=9)
    newest = stage.checkpoints(job_id)[0].step
    move_to(stage, "b")
    with monkeypatch.context() as patch:
        patch.setattr("worker.attempt.damage", lambda *_: "has other bytes")
        stage.run(job_id, crash_at=3, crash_attempts=9)
    assert stage.trace(job_id)[-1]["step"] == 0
    move_to(stage, "c")
    stage.run(job_id, crash_at=13, crash_attempts=9)
    assert stage.trace(job_id)[-1]["step"] == newest


def test_half_an_upload_of_a_process_that_died_goes(bind: Engine, remote: Settings, tmp_path: Path) -> None:
    storage = open_storage(remote)
    storage.doubt("models/model_1")  # the first of its files arrived, the manifest never did
    ObjectStore.of(remote).put("models/model_1/model-00001-of-00002.safetensors", b"weights")
    uploads.settle(bind, storage, older_than_seconds=-60)
    assert not (tmp_path / "bucket/models/model_1/model-00001-of-00002.safetensors").exists()
    assert storage.doubtful(-60) == []


def test_what_a_preparer_makes_is_everybodys(stage: Stage) -> None:
    api = open_storage(stage.settings)
    dataset = add_dataset(stage.bind, api)
    assert not (stage.settings.data_dir / "datasets").exists()
    move_to(stage, "b")
    preparer = Preparer(stage.bind, stage.settings, "w")
    assert preparer.step()
    move_to(stage, "c")
    assert b"".join(open_storage(stage.settings).blocks(f"datasets/{dataset.id}/tokens-bytes/documents.bin"))
    with transaction(stage.bind) as session:
        session.execute(text("UPDATE tokenizations SET status = 'pending', retry_at = NULL"))
    assert Preparer(stage.bind, stage.settings, "w").step()  # finds it made
    assert not (stage.settings.data_dir / "datasets" / dataset.id / "data.txt").exists()


def test_what_a_preparer_finds_made_stays_until_it_is_published(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = add_dataset(stage.bind, open_storage(stage.settings))
    move_to(stage, "b")
    assert Preparer(stage.bind, stage.settings, "w").step()
    with transaction(stage.bind) as session:
        session.execute(text("UPDATE tokenizations SET status = 'pending', retry_at = NULL"))
    here, real, left = open_storage(stage.settings), ObjectStorage.publish, []

    def publish(self: ObjectStorage, relative: str, *arguments: Any) -> None:
        assert isinstance(here, ObjectStorage)
        here._cache.make_room(0)  # as another slot of this host does for what it fetches
        left.append((here.path(relative) / "meta.json").exists())
        real(self, relative, *arguments)

    monkeypatch.setattr(ObjectStorage, "publish", publish)
    assert Preparer(stage.bind, stage.settings, "w").step()
    assert left == [True], dataset.id


def test_a_data_folder_is_copied_with_what_its_rows_name(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Storage(tmp_path / "old")
    dataset, gone = (add_dataset(stage.bind, old).id for _ in range(2))
    old.remove(f"datasets/{gone}")
    assert Preparer(
        stage.bind, stage.settings.model_copy(update={"storage_url": None, "data_dir": old.root}), "w"
    ).step()
    claimed = claim(stage.bind, stage.create_job())
    with transaction(stage.bind) as session:
        add_checkpoint(session, old, claimed, 5, None)
    old.make_folder("datasets/ds_of_nobody")
    monkeypatch.setattr(storage_program, "load_settings", lambda: stage.settings)
    answers = []
    for _ in range(2):
        assert storage_program.main(["--from", str(old.root)]) == 1  # some are missing: of the stage's own dataset, too
        answers.append(json.loads(capsys.readouterr().out))
    assert [(answer["copied"], answer["already_there"]) for answer in answers] == [(3, 0), (0, 3)]
    assert f"datasets/{gone}/data.txt" in answers[0]["missing"]
    new = open_storage(stage.settings)
    with ExitStack() as held:
        for path in (
            f"datasets/{dataset}/tokens-bytes/meta.json",
            f"{claimed.checkpoints_dir}/step-00000005/config.json",
        ):
            assert new.hold(path, held).read_bytes() == old.path(path).read_bytes()


@pytest.fixture
def remote(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"storage_url": f"file://{tmp_path / 'bucket'}"})


@pytest.fixture
def checkpoint(bind: Engine, remote: Settings, tmp_path: Path) -> tuple[ClaimedJob, bytes]:
    worker = open_storage(remote.model_copy(update={"data_dir": tmp_path / "worker"}))
    claimed = claim(bind, add_job(bind, add_dataset(bind, worker).id).id)
    with transaction(bind) as session:
        add_checkpoint(session, worker, claimed, 2, 1.5)
    path = f"{claimed.checkpoints_dir}/step-00000002"
    worker.publish(path)
    return claimed, worker.path(f"{path}/model.safetensors").read_bytes()


def test_a_download_comes_from_the_store(
    remote: Settings, checkpoint: tuple[ClaimedJob, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, content = checkpoint
    url = f"/jobs/{job.id}/checkpoints/2/files/model.safetensors"
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    with TestClient(create_app(remote), base_url="http://127.0.0.1") as client:
        whole = client.get(url)
        assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, content, etag)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
        for header, part in (
            ("bytes=5-9", slice(5, 10)),
            ("bytes=100-", slice(100, None)),
            ("bytes=-7", slice(-7, None)),
        ):
            answer = client.get(url, headers={"Range": header, "If-Range": etag})
            assert (answer.status_code, answer.content) == (206, content[part])
        several = client.get(url, headers={"Range": "bytes=5-9, 0-1"})
        assert several.status_code == 206
        assert several.content.index(content[5:10]) >= 0
        head = client.head(url)
        assert (head.headers["content-length"], head.content) == (str(len(content)), b"")
        assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
        assert client.get(url, headers={"Range": "bytes=999999-"}).status_code == 416
        assert client.get("/readyz").json()["checks"]["storage"] is True
        assert not (remote.data_dir / "jobs").exists()

        def away(*_: Any) -> Any:
            raise StorageUnavailableError("in-the-detail")

        for method in ("entry", "check", "get", "put", "put_file"):
            monkeypatch.setattr(ObjectStore, method, away)
        client.app.state.context.readiness._looked_at = None  # type: ignore[attr-defined]
        refused = client.get(url)
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
        assert refused.headers["retry-after"] == "10"
        assert "in-the-detail" not in refused.text
        assert client.get("/readyz").json()["checks"]["storage"] is False
        sample = client.post(f"/jobs/{job.id}/generate", json={"prompt": "x"})
        assert (sample.status_code, sample.json()["code"]) == (503, "storage_unavailable")
        upload = client.post("/datasets", files={"file": ("text.txt", b"text")})
        assert (upload.status_code, upload.json()["code"]) == (503, "storage_unavailable")


def test_a_download_holds_no_connection_while_it_waits_for_the_store(
    remote: Settings, checkpoint: tuple[ClaimedJob, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, content = checkpoint
    real, held = ObjectStore.entry, []
    with TestClient(create_app(remote), base_url="http://127.0.0.1") as client:
        pool = client.app.state.context.engine.pool  # type: ignore[attr-defined]

        def entry(self: ObjectStore, key: str) -> Any:
            held.append(pool.checkedout())
            return real(self, key)

        monkeypatch.setattr(ObjectStore, "entry", entry)
        file_id = ResultId(job.id, 2, 1)
        for url in (f"/jobs/{job.id}/checkpoints/2/files/model.safetensors", f"/v1/files/{file_id}/content"):
            assert client.get(url).status_code == 200, content
    assert held == [0, 0]


def test_what_no_host_could_fetch_is_missing_to_verify(
    bind: Engine, remote: Settings, checkpoint: tuple[ClaimedJob, bytes]
) -> None:
    job, _ = checkpoint
    storage, path = open_storage(remote), f"{job.checkpoints_dir}/step-00000002"
    assert inventory.faults(bind, storage) == []
    ObjectStore.of(remote).delete([f"manifests/{path}.json"])
    assert [(fault.path, fault.what) for fault in inventory.faults(bind, storage)] == [(path, "has no manifest")]


@pytest.mark.parametrize("program", [verify_program, prune_program])
def test_programs_say_that_the_files_cannot_be_reached(
    remote: Settings,
    checkpoint: tuple[ClaimedJob, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: Any,
) -> None:
    settings = remote.model_copy(update={"keep_jobs_days": 1})
    monkeypatch.setattr(program, "load_settings", lambda: settings)

    def away(*_: Any) -> Any:
        raise StorageUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "entry", away)
        if program is verify_program:
            assert program.main([]) == 3
            assert "does not answer" in capsys.readouterr().err
    settings = settings.model_copy(update={"data_dir": remote.data_dir / "old"})
    (settings.data_dir / "datasets").mkdir(parents=True)
    assert program.main([]) == 3
    assert "service.storage_program" in capsys.readouterr().err


def test_a_folder_with_files_of_its_own_is_not_taken_for_copies(remote: Settings) -> None:
    (remote.data_dir / "datasets" / "ds_1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"service\.storage_program"):
        open_storage(remote)
    open_storage(remote.model_copy(update={"data_dir": remote.data_dir / "new"})).expect("datasets/ds_1", ExitStack())
    open_storage(remote.model_copy(update={"data_dir": remote.data_dir / "new"}))


def test_a_worker_that_cannot_have_copies_takes_no_job(stage: Stage) -> None:
    job_id = stage.create_job(steps=5)
    move_to(stage, "b")
    (stage.settings.data_dir / "datasets" / "ds_1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"service\.storage_program"):
        stage.run(job_id)
    with transaction(stage.bind) as session:
        assert (jobs.get(session, job_id).status, jobs.get(session, job_id).attempt) == ("queued", 0)


def test_a_host_that_cannot_reach_the_store_takes_no_job(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_store: ObjectStore, _folder: str) -> None:
        raise StorageDeniedError("expired")

    job_id = stage.create_job(steps=5)
    with monkeypatch.context() as away:
        away.setattr(ObjectStore, "check", check)
        assert (stage.run(job_id).status, stage.run(job_id).attempt) == ("queued", 0)
    assert stage.run(job_id).status == "succeeded"


def test_a_folder_is_still_what_there_is_without_a_store(settings: Settings) -> None:
    assert type(open_storage(settings)) is Storage
