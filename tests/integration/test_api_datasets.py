"""Datasets over HTTP."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from service.settings import Settings
from service.storage import Storage


def upload(client: TestClient, filename: str, content: bytes, **fields: str) -> Any:
    return client.post("/datasets", files={"file": (filename, content)}, data=fields)


def files_below(storage: Storage) -> list[str]:
    return [str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file()]


def test_a_text_file_is_stored_counted_and_found(client: TestClient, storage: Storage) -> None:
    content = "na\u00efve caf\u00e9\n".encode() * 50
    answer = upload(client, "notes.TXT", content, name="Notes")
    assert answer.status_code == 201
    dataset = answer.json()
    assert answer.headers["location"] == f"/datasets/{dataset['id']}"
    expected = {
        "name": "Notes",
        "filename": "notes.TXT",
        "format": "txt",
        "bytes": len(content),
        "documents": 1,
        "tokens": len(content) + 1,
        "longest_document_tokens": len(content) + 1,
        "sha256": hashlib.sha256(content).hexdigest(),
        "problems": [],
    }
    assert expected.items() <= dataset.items()
    assert dataset["created_at"].endswith("Z")
    assert files_below(storage) == [f"datasets/{dataset['id']}/data.txt"]
    assert storage.path(f"datasets/{dataset['id']}/data.txt").read_bytes() == content
    assert client.get(f"/datasets/{dataset['id']}").json() == dataset
    assert client.get("/datasets").json() == {"data": [dataset], "has_more": False}


def test_a_jsonl_file_is_counted_by_document(client: TestClient) -> None:
    lines = [json.dumps({"text": word}) for word in ("one", "three", "\u00e9")]
    dataset = upload(client, "a.jsonl", "\n".join(lines).encode()).json()
    assert (dataset["documents"], dataset["tokens"], dataset["longest_document_tokens"]) == (3, 13, 6)
    assert dataset["name"] == "a.jsonl"


def test_broken_lines_are_named_and_nothing_is_stored(client: TestClient, storage: Storage) -> None:
    lines = [b'{"text": "good"}'] * 40
    for number in range(5, 35):
        lines[number] = b'{"text": ' + b"\\" * 10_000
    answer = upload(client, "a.jsonl", b"\n".join(lines))
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["code"] == "dataset_invalid"
    assert [item["line"] for item in problem["problems"]] == list(range(6, 26))
    assert problem["total_problems"] == 30
    assert len(answer.content) < 8_192
    assert files_below(storage) == []
    assert client.get("/datasets").json()["data"] == []


@pytest.mark.parametrize(
    ("filename", "content", "code"),
    [
        ("a.txt", b"", "dataset_invalid"),
        ("a.txt", b"\xff\xfe", "dataset_invalid"),
        ("a.jsonl", b"\n", "dataset_invalid"),
        ("a.csv", b"x", "dataset_format_unsupported"),
        ("txt", b"x", "dataset_format_unsupported"),
        ("model.pt", b"PK\x03\x04", "dataset_format_unsupported"),
    ],
)
def test_what_is_no_dataset_is_refused(
    shared_client: TestClient, shared_settings: Settings, filename: str, content: bytes, code: str
) -> None:
    answer = upload(shared_client, filename, content)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert files_below(Storage(shared_settings.data_dir)) == []


@pytest.mark.parametrize(
    "filename",
    ["../../../evil.txt", "/etc/evil.txt", "..\\evil.txt", "a\0b.txt", "e" * 3_900 + ".txt", "\u202e\u0007.txt"],
)
def test_a_hostile_file_name_is_metadata_at_most(client: TestClient, storage: Storage, filename: str) -> None:
    answer = upload(client, filename, b"text")
    assert answer.status_code == 201
    dataset = answer.json()
    assert len(dataset["filename"]) <= 200
    assert "/" not in dataset["filename"]
    assert "\\" not in dataset["filename"]
    assert files_below(storage) == [f"datasets/{dataset['id']}/data.txt"]


def test_a_file_over_the_limit_is_refused_and_gone(client: TestClient, storage: Storage) -> None:
    assert upload(client, "a.txt", b"x" * 2**20).status_code == 201
    answer = upload(client, "b.txt", b"x" * (2**20 + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    assert answer.json()["max_upload_bytes"] == 2**20
    assert len(files_below(storage)) == 1


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data; boundary=x", b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nab',
        ),
        ("multipart/form-data; boundary=x", b"--y\r\n"),
    ],
)
def test_a_form_without_a_whole_file_is_refused(
    shared_client: TestClient, shared_settings: Settings, content_type: str, content: bytes
) -> None:
    answer = shared_client.post("/datasets", content=content, headers={"content-type": content_type})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"][0]["field"] == "file"
    assert files_below(Storage(shared_settings.data_dir)) == []


def test_a_row_that_cannot_be_written_takes_the_file_with_it(
    client: TestClient, bind: Engine, storage: Storage
) -> None:
    with bind.begin() as connection:
        connection.execute(text("ALTER TABLE datasets ADD CHECK (bytes <> 4)"))
    assert upload(client, "a.txt", b"text").status_code == 500
    assert files_below(storage) == []
    assert upload(client, "a.txt", b"texts").status_code == 201


def test_pages_and_deletion(client: TestClient, storage: Storage) -> None:
    ids = [upload(client, "a.txt", b"text").json()["id"] for _ in range(5)]
    first = client.get("/datasets", params={"limit": 3}).json()
    second = client.get("/datasets", params={"limit": 3, "after": first["data"][-1]["id"]}).json()
    assert [row["id"] for row in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert client.delete(f"/datasets/{ids[0]}").status_code == 204
    assert client.delete(f"/datasets/{ids[0]}").status_code == 404
    assert client.get(f"/datasets/{ids[0]}").status_code == 404
    assert not storage.path(f"datasets/{ids[0]}").exists()
    assert storage.path(f"datasets/{ids[1]}").exists()


def test_a_dataset_in_use_is_kept(client: TestClient, storage: Storage) -> None:
    dataset = upload(client, "a.txt", b"text " * 100).json()["id"]
    job = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 64, "steps": 1}
    job_id = client.post("/jobs", json=job).json()["id"]
    answer = client.delete(f"/datasets/{dataset}")
    assert (answer.status_code, answer.json()["code"], answer.json()["jobs"]) == (409, "dataset_in_use", [job_id])
    assert storage.path(f"datasets/{dataset}/data.txt").exists()
    client.post(f"/jobs/{job_id}/cancel")
    assert client.delete(f"/datasets/{dataset}").status_code == 204
