"""One API and workers with disks of their own beside one S3 server: jobs that move between hosts, a store that is away,
and the store's client against a real server's answers.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from service import object_store
from service.errors import StorageDeniedError, StorageUnavailableError
from service.object_storage import ObjectStorage
from service.object_store import ObjectStore
from service.patience import Patience
from service.settings import Settings
from service.storage import open_storage
from tests.extra.s3_server import BUCKET, KEY, REGION, SECRET, Cut, free_port, s3_server, unfinished_uploads
from tests.integration.stage import Stage, open_stage, wait_for

pytestmark = pytest.mark.extra

TEXT = "".join(f"Line {number} of a text that nobody has to read twice.\n" for number in range(4_000)).encode()
LEASE = {"SLIMTUNE_LEASE_SECONDS": "6", "SLIMTUNE_SELF_KILL_SECONDS": "5"}


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def cut(s3: int) -> Iterator[Cut]:
    proxy = Cut(s3)
    yield proxy
    proxy.close()


@dataclass
class Site:
    """The processes, each with a data folder of its own."""

    stage: Stage
    folder: Path
    api: httpx2.Client

    def host(self, name: str) -> Path:
        return self.folder / name

    def worker(self, name: str) -> Any:
        command = [sys.executable, "-m", "celery", "--quiet", "-A", "tests.integration.real_worker", "worker"]
        command += ["--loglevel=INFO", "--without-mingle", "--without-gossip"]
        return self.stage.start(f"worker-{name}", command, SLIMTUNE_DATA_DIR=str(self.host(name)), **LEASE)

    def submit(self, dataset: str, **options: Any) -> str:
        body = {"model": "performer-tiny", "dataset": dataset, "sequence_length": 64, "memory_cap": "1GiB", "seed": 5}
        answer = self.api.post("/jobs", json={**body, **options})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def losses(self, job_id: str) -> list[float | None]:
        return [row.loss for row in self.stage.metrics(job_id)]


@pytest.fixture
def site(database_url: str, redis_url: str, tmp_path: Path, cut: Cut) -> Iterator[Site]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        stage.overrides = {
            "SLIMTUNE_STORAGE_URL": f"s3://{BUCKET}/{tmp_path.name}",
            "SLIMTUNE_STORAGE_PATIENCE_SECONDS": "60",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{cut.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_ALLOW_HTTP": "true",
        }
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
        stage.start("api", [*command, "--http", "api.protocol:LimitedHttp"], SLIMTUNE_DATA_DIR=str(tmp_path / "api"))
        sweeper = [sys.executable, "-m", "worker.sweeper"]
        stage.start("sweeper", sweeper, SLIMTUNE_DATA_DIR=str(tmp_path / "sweeper"), **LEASE)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api:

            def answers() -> bool:
                try:
                    return api.get("/healthz").status_code == 200
                except httpx2.TransportError:
                    return False

            wait_for("an API that answers", answers, 60)
            yield Site(stage, tmp_path, api)
        for log in stage.logs.iterdir():
            assert SECRET.encode() not in log.read_bytes(), log


def kill(process: Any) -> None:
    """kill -9, to all of a worker."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def files_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_a_job_survives_its_host_and_the_store_s_absence(site: Site, cut: Cut) -> None:
    stage = site.stage
    dataset = site.api.post("/datasets", files={"file": ("text.txt", TEXT)}).json()["id"]
    options = {"steps": 240, "checkpoint_every": 40}
    first = site.worker("a")
    job_id = site.submit(dataset, **options)
    wait_for("a checkpoint", lambda: stage.checkpoints(job_id), 90)
    assert files_below(site.host("api")) == []
    kill(first)
    killed_at = stage.job(job_id).step
    assert killed_at < 240
    site.worker("b")
    resumed = wait_for("the second attempt", lambda: stage.events(job_id, "training")[1:], 60)
    assert resumed[0][1]["step"] >= 40
    assert (site.host("b") / "jobs" / job_id / "checkpoints").is_dir()

    cut.refuse()  # while it trains: steps go on, checkpoints wait
    assert wait_for("a note of the absence", lambda: stage.events(job_id, "storage_waiting"), 60)
    assert site.api.get("/readyz").json()["checks"]["storage"] is False
    assert site.api.post("/datasets", files={"file": ("t.txt", b"text")}).json()["code"] == "storage_unavailable"
    stage.reach(job_id, 240, 60)
    assert stage.job(job_id).status == "running"
    cut.answer()
    stage.end(job_id, "succeeded", 60)

    undisturbed = site.submit(dataset, **options)
    stage.end(undisturbed, "succeeded", 90)
    assert len(site.losses(job_id)) == 240
    assert site.losses(job_id) == site.losses(undisturbed)

    url = f"/jobs/{job_id}/checkpoints/final/files/model.safetensors"
    head = site.api.head(url)
    size, etag = int(head.headers["content-length"]), head.headers["etag"]
    half = size // 2
    parts = [
        site.api.get(url, headers={"Range": part, "If-Range": etag})
        for part in (f"bytes=0-{half - 1}", f"bytes={half}-")
    ]
    assert [part.status_code for part in parts] == [206, 206]
    assert f'"{hashlib.sha256(b"".join(part.content for part in parts)).hexdigest()}"' == etag
    assert files_below(site.host("api")) == []
    sample = site.api.post(f"/jobs/{job_id}/generate", json={"prompt": "Line", "max_tokens": 4, "seed": 1})
    assert sample.status_code == 200, sample.text
    assert site.api.delete(f"/datasets/{dataset}").status_code == 204


def store(s3: int, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "database_url": "postgresql://",
        "redis_url": "redis://",
        "data_dir": Path("/nowhere"),
        "storage_url": f"s3://{BUCKET}/alone",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": SecretStr(KEY),
        "AWS_SECRET_ACCESS_KEY": SecretStr(SECRET),
        "AWS_REGION": REGION,
        "AWS_ALLOW_HTTP": True,
    }
    return Settings(**{**fields, **changes})


def test_an_interrupted_file_leaves_nothing_in_the_store(
    s3: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    storage = open_storage(store(s3, data_dir=tmp_path / "a"))
    folder = storage.make_folder("jobs/job_1/checkpoints/attempt-0001/step-00000001")
    (folder / "model.safetensors").write_bytes(os.urandom(18 << 20))
    relative = str(folder.relative_to(storage.root))

    class FencedError(Exception):
        pass

    records = [{"name": "model.safetensors", "bytes": 18 << 20, "sha256": "0" * 64}]
    beats = iter(range(100))

    def beat() -> None:
        if next(beats) > 4:
            raise FencedError

    with pytest.raises(FencedError):
        storage.publish(relative, Patience(beat=beat), records)
    assert unfinished_uploads(s3) == 0
    assert not storage.exists(relative)
    storage.publish(relative)
    other = open_storage(store(s3, data_dir=tmp_path / "b"))
    with ExitStack() as held:
        got = other.hold(relative, held) / "model.safetensors"
        assert got.read_bytes() == (folder / "model.safetensors").read_bytes()
    other.remove("jobs/job_1")
    assert isinstance(other, ObjectStorage)
    assert list(ObjectStore.of(store(s3)).entries("")) == []


def test_a_manifest_is_created_once(s3: int) -> None:
    objects = ObjectStore.of(store(s3))
    assert [objects.create("manifests/x.json", data) for data in (b"1", b"2")] == [True, False]
    assert objects.get("manifests/x.json") == b"1"
    objects.delete(["manifests/x.json", "manifests/never.json"])
    with pytest.raises(FileNotFoundError):
        objects.get("manifests/x.json")


def test_what_is_wrong_with_a_store_is_told_apart(s3: int, cut: Cut) -> None:
    with pytest.raises(StorageDeniedError):
        ObjectStore.of(store(s3, storage_url="s3://no-such-bucket/x")).put("a", b"")
    cut.refuse()
    with pytest.raises(StorageUnavailableError) as caught:
        ObjectStore.of(store(cut.port)).get("a")
    assert not isinstance(caught.value, StorageDeniedError)
    assert SECRET not in caught.value.detail + str(caught.value)
