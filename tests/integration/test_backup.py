"""A backup that is made while jobs run, as docs/operating.md says, brings them back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, make_url
from starlette.testclient import TestClient

from cli.embedded import _postgres_binary
from service import inventory, verify_program
from service.database import transaction
from service.models import Checkpoint, Job
from service.storage import Storage, checkpoints_dir
from tests.integration.fake_trainer import loss_at
from tests.integration.seed import add_dataset
from tests.integration.stage import Stage, open_stage


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def postgres(program: str, stage: Stage, *arguments: str) -> None:
    url = make_url(stage.settings.database_url)
    where = ["--host", str(url.query["host"]), "--username", str(url.username)]
    subprocess.run([str(_postgres_binary(program)), *where, *arguments], check=True, env={"PATH": os.environ["PATH"]})


def half_done(stage: Stage) -> str:
    """A job that was paused after some checkpoints."""
    job_id = stage.create_job(steps=40, keep=1)
    assert stage.run(job_id, crash_at=12).status == "queued"
    return job_id


def test_what_is_backed_up_while_a_job_runs_goes_on_from_there(stage: Stage, tmp_path: Path) -> None:
    data, backup, dump = stage.settings.data_dir, tmp_path / "backup", tmp_path / "slimtune.dump"
    name = str(make_url(stage.settings.database_url).database)
    real = add_dataset(stage.bind, Storage(data))
    finished = stage.create_job(steps=7)
    assert stage.run(finished).status == "succeeded"
    job_id = half_done(stage)

    (data / "backup-in-progress").touch()
    postgres("pg_dump", stage, "--format=custom", f"--file={dump}", name)
    assert stage.run(job_id, crash_at=23).status == "queued"  # its checkpoint of the dump is superseded
    assert [row.step for row in stage.checkpoints(job_id)] == [20]
    subprocess.run(["cp", "-a", str(data), str(backup)], check=True)
    (data / "backup-in-progress").unlink()

    shutil.rmtree(data)
    stage.bind.dispose()
    postgres("dropdb", stage, "--force", name)
    postgres("createdb", stage, name)
    postgres("pg_restore", stage, "--exit-on-error", f"--dbname={name}", str(dump))
    subprocess.run(["cp", "-a", str(backup), str(data)], check=True)
    (data / "backup-in-progress").unlink()

    faults = [fault for fault in inventory.faults(stage.bind, Storage(data), hashes=True) if real.id in fault.owner]
    assert faults == []
    missing = [fault for fault in inventory.faults(stage.bind, Storage(data)) if "checkpoints" in fault.owner]
    assert missing == []
    assert [row.step for row in stage.checkpoints(job_id)] == [10]
    assert stage.run(job_id).status == "succeeded"
    assert stage.trace(job_id)[-1]["step"] == 10
    assert [(row.step, row.loss) for row in stage.metrics(job_id)] == [(step, loss_at(step)) for step in range(1, 41)]


def test_what_is_missing_damaged_or_nobodys_is_named(
    bind: Engine,
    storage: Storage,
    client: TestClient,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = client.app.state.context.settings  # type: ignore[attr-defined]
    monkeypatch.setattr(verify_program, "load_settings", lambda: settings)

    def verify(*options: str) -> tuple[int, dict[str, Any]]:
        code = verify_program.main([*options, "--json"])
        return code, json.loads(capsys.readouterr().out)

    stray = storage.make_folder("jobs/job_of_nobody")
    code, found = verify("--collect")
    assert (code, found["unowned"], found["collected"]) == (0, ["jobs/job_of_nobody"], False)  # an empty database
    whole, short, changed, gone = (add_dataset(bind, storage) for _ in range(4))
    path = {each.id: storage.path(f"datasets/{each.id}/data.txt") for each in (whole, short, changed, gone)}
    path[short.id].write_bytes(path[short.id].read_bytes()[1:])
    path[changed.id].write_bytes(bytes(len(path[changed.id].read_bytes())))
    path[gone.id].unlink()
    code, found = verify()
    assert code == 1
    whats = {fault["path"].split("/")[1]: fault["what"] for fault in found["faults"]}
    assert whats == {short.id: f"has {short.bytes - 1} bytes instead of {short.bytes}", gone.id: "is missing"}
    code, found = verify("--hashes", "--collect")
    assert (len(found["faults"]), found["collected"]) == (3, False)
    for each in (short, changed, gone):
        assert client.delete(f"/datasets/{each.id}").status_code == 204
    code, found = verify("--hashes", "--collect")
    assert (code, found["faults"], found["collected"]) == (0, [], True)
    assert stray.exists()  # for an hour
    assert storage.doubtful(-1) == ["jobs/job_of_nobody"]
    assert verify()[1]["unowned"] == []


def test_a_checkpoint_of_before_there_were_folders_of_attempts_is_its_job_s(
    bind: Engine, storage: Storage, job: Job
) -> None:
    path = f"{checkpoints_dir(job.id)}/step-00000005"
    (storage.make_folder(path) / "model.safetensors").write_bytes(b"weights")
    with transaction(bind) as session:
        session.add(Checkpoint(job_id=job.id, step=5, attempt=1, files=[], path=path))
    stray = f"{checkpoints_dir(job.id)}/step-00000004"
    (storage.make_folder(stray) / "model.safetensors").write_bytes(b"weights")
    assert inventory.unowned(bind, storage) == [f"{stray}/model.safetensors"]
