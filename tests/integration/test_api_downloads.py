"""Checkpoint files over HTTP."""

from __future__ import annotations

import base64
import hashlib

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service import checkpoints, runs
from service.database import transaction
from service.runs import ClaimedJob
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim


@pytest.fixture
def settings(shared_settings: Settings) -> Settings:
    """Every test here has a job of its own."""
    return shared_settings


@pytest.fixture
def run(bind: Engine, storage: Storage) -> ClaimedJob:
    claimed = claim(bind, add_job(bind, add_dataset(bind, storage).id).id)
    with transaction(bind) as session:
        for step, loss in ((2, 1.5), (4, 2.5), (6, 3.5)):
            add_checkpoint(session, storage, claimed, step, loss)
    return claimed


@pytest.fixture
def url(run: ClaimedJob) -> str:
    return f"/jobs/{run.id}/checkpoints"


@pytest.fixture
def content(storage: Storage, run: ClaimedJob) -> bytes:
    return storage.path(f"{run.checkpoints_dir}/step-00000006/model.safetensors").read_bytes()


def test_checkpoints_are_listed_and_named(client: TestClient, bind: Engine, run: ClaimedJob, url: str) -> None:
    listed = client.get(url).json()
    assert [(row["step"], row["is_best"], row["metrics"]["validation_loss"]) for row in listed["data"]] == [
        (6, False, 3.5),
        (4, False, 2.5),
        (2, True, 1.5),
    ]
    assert {file["name"] for file in listed["data"][0]["files"]} == {"config.json", "model.safetensors"}
    for which, step in (("4", 4), ("latest", 6), ("best", 2)):
        assert client.get(f"{url}/{which}").json()["step"] == step
    missing = client.get(f"{url}/final").json()
    assert (missing["code"], "has succeeded" in missing["hint"]) == ("checkpoint_not_found", True)
    with transaction(bind) as session:
        runs.finish(session, run.id, run.attempt, "succeeded")
    assert client.get(f"{url}/final").json()["step"] == 6


def test_a_download_is_whole_and_carries_its_hash(client: TestClient, url: str, content: bytes) -> None:
    answer = client.get(f"{url}/latest/files/model.safetensors")
    digest = hashlib.sha256(content)
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/octet-stream"
    head = client.head(f"{url}/latest/files/model.safetensors")
    assert (head.status_code, head.content) == (200, b"")
    names = ("etag", "content-length", "repr-digest", "accept-ranges")
    assert [head.headers[name] for name in names] == [answer.headers[name] for name in names]


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-9", slice(5, 10)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
    ],
)
def test_a_range_is_that_part(client: TestClient, url: str, content: bytes, header: str, part: slice) -> None:
    answer = client.get(f"{url}/6/files/model.safetensors", headers={"range": header})
    assert (answer.status_code, answer.content) == (206, content[part])
    start = range(len(content))[part].start
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/{len(content)}"
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'


def test_a_broken_download_can_be_continued_unless_the_file_changed(
    client: TestClient, url: str, content: bytes
) -> None:
    half = len(content) // 2
    headers = {"range": f"bytes={half}-", "if-range": f'"{hashlib.sha256(content).hexdigest()}"'}
    answer = client.get(f"{url}/6/files/model.safetensors", headers=headers)
    assert (answer.status_code, content[:half] + answer.content) == (206, content)
    changed = client.get(f"{url}/6/files/model.safetensors", headers={**headers, "if-range": '"other"'})
    assert (changed.status_code, changed.content) == (200, content)


def test_what_the_client_has_is_not_sent_again(client: TestClient, url: str, content: bytes) -> None:
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    for known in (etag, f'"other", W/{etag}', "*"):
        answer = client.get(f"{url}/6/files/model.safetensors", headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    answer = client.get(f"{url}/6/files/model.safetensors", headers={"if-none-match": '"other"'})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("header", "status", "code"),
    [
        ("bytes=999999-", 416, "range_not_satisfiable"),
        ("bytes=9-5", 400, "range_malformed"),
        ("x", 400, "range_malformed"),
    ],
)
def test_a_bad_range_is_a_problem(client: TestClient, url: str, header: str, status: int, code: str) -> None:
    answer = client.get(f"{url}/6/files/model.safetensors", headers={"range": header})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.headers.get("content-range", "").startswith("bytes */")) == (status == 416)


@pytest.mark.parametrize(
    "path",
    [
        "6/files/nothing",
        "6/files/..%2Fconfig.json",
        "6/files/..%2F..%2F..%2F..%2Fetc%2Fpasswd",
        "6/files/%2e%2e",
        "6/files/adapter%2Fconfig.json",
        "6/files/config.json%00",
        "6/files/",
        "5/files/config.json",
        "..%2Fstep-00000006/files/config.json",
        "step-00000006/files/config.json",
    ],
)
def test_only_what_the_row_lists_is_served(client: TestClient, url: str, path: str) -> None:
    assert client.get(f"{url}/{path}").status_code == 404


def test_a_file_in_a_folder_of_the_checkpoint_is_served(
    client: TestClient, bind: Engine, storage: Storage, run: ClaimedJob
) -> None:
    path = f"{run.checkpoints_dir}/step-00000008"
    content = b"{}"
    storage.path(f"{path}/adapter").mkdir(parents=True)
    storage.path(f"{path}/adapter/adapter_config.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    files = [{"name": "adapter/adapter_config.json", "bytes": len(content), "sha256": digest}]
    with transaction(bind) as session:
        checkpoints.register(session, run.id, run.attempt, 8, files=files, path=path)
    answer = client.get(f"/jobs/{run.id}/checkpoints/8/files/adapter/adapter_config.json")
    assert (answer.status_code, answer.content) == (200, content)
    assert 'filename="adapter_config.json"' in answer.headers["content-disposition"]
    assert client.get(f"/jobs/{run.id}/checkpoints/8/files/adapter").status_code == 404


def test_a_file_beside_the_listed_ones_is_not_served(
    client: TestClient, storage: Storage, run: ClaimedJob, url: str
) -> None:
    storage.path(f"{run.checkpoints_dir}/step-00000006/secret").write_text("x")
    assert client.get(f"{url}/6/files/secret").status_code == 404
    assert client.get(f"{url}/6/files/config.json").status_code == 200


def test_a_damaged_or_missing_file_is_not_handed_out(
    client: TestClient, storage: Storage, run: ClaimedJob, url: str
) -> None:
    file = storage.path(f"{run.checkpoints_dir}/step-00000006/config.json")
    file.write_text("cut")
    answer = client.get(f"{url}/6/files/config.json")
    assert (answer.status_code, answer.json()["code"]) == (500, "checkpoint_damaged")
    file.unlink()
    assert client.get(f"{url}/6/files/config.json").json()["code"] == "file_not_found"
