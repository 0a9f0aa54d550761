"""Tokenizers and tokenizations over HTTP, and jobs that depend on them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from service import database, runs
from service.settings import Settings
from service.storage import Storage
from worker.preparer import Preparer

TINY = {"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2}, "unk_token": "b"}}
LINES = b"\n".join(json.dumps({"text": f"document number {number}"}).encode() for number in range(20))


@pytest.fixture
def prepare(bind: Engine, settings: Settings) -> Callable[[], None]:
    """Do all the work that waits, as a worker's preparer would."""

    def until_idle() -> None:
        preparer = Preparer(bind, settings, "a worker")
        while preparer.step():
            pass

    return until_idle


def upload(client: TestClient, filename: str, content: bytes, **fields: str) -> Any:
    return client.post("/datasets", files={"file": (filename, content)}, data=fields)


def send_tokenizer(
    client: TestClient, value: Any = TINY, *more: tuple[str, bytes], name: str = "tokenizer.json"
) -> Any:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return client.post("/tokenizers", files=[("file", file) for file in ((name, content), *more)])


def files_below(storage: Storage) -> list[str]:
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


def job_of(dataset: str, **changes: Any) -> dict[str, Any]:
    job = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 8, "steps": 1}
    return {name: value for name, value in (job | changes).items() if value is not None}


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_dataset_says_what_its_tokens_are(
    client: TestClient, prepare: Callable[[], None], ending: str, pack: Callable[[bytes], bytes]
) -> None:
    dataset = upload(client, f"a.jsonl{ending}", pack(LINES)).json()
    assert (dataset["documents"], dataset["kind"], dataset["format"]) == (20, "text", "jsonl")
    [waiting] = dataset["tokenizations"]
    assert (waiting["tokenizer"], waiting["status"], waiting["tokens"]) == ("bytes", "pending", None)
    prepare()
    [ready] = client.get(f"/datasets/{dataset['id']}").json()["tokenizations"]
    assert (ready["status"], ready["tokens"], ready["targets"]) == ("ready", dataset["tokens"], dataset["tokens"])
    assert (ready["longest_document_tokens"], ready["histogram"]) == (dataset["longest_document_tokens"], {"32": 20})
    assert (ready["problems"], ready["error"], ready["empty_documents"]) == ([], None, 0)


@pytest.mark.parametrize(
    ("line", "kind", "targets"),
    [
        ({"prompt": "ab", "completion": "cde"}, "prompt_completion", 4),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", None),
    ],
)
def test_loss_lies_on_what_is_to_be_learnt(
    client: TestClient, prepare: Callable[[], None], line: dict[str, Any], kind: str, targets: int | None
) -> None:
    dataset = upload(client, "a.jsonl", json.dumps(line).encode()).json()
    assert (dataset["kind"], dataset["documents"], dataset["tokens"]) == (kind, 1, None)
    prepare()
    [ready] = client.get(f"/datasets/{dataset['id']}").json()["tokenizations"]
    assert 0 < ready["targets"] < ready["tokens"]
    assert targets in (None, ready["targets"])


@pytest.mark.parametrize(
    ("filename", "content", "line"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": 5}\n'), 2),
        ("a.txt.zst", zstandard.compress(b"one\n\xff"), 2),
        ("a.txt.gz", gzip.compress(b"text")[:-1], None),
        ("a.txt.zst", b"text", None),
        ("a.parquet", b"text", None),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', 2),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', 1),
    ],
    # gzip writes the time: made from the content, the names would differ between the processes of one run.
    ids=["gzip-line", "zstd-text", "gzip-cut", "zstd-none", "parquet-none", "completion-missing", "content-missing"],
)
def test_a_broken_file_is_refused_while_it_arrives(
    client: TestClient, storage: Storage, filename: str, content: bytes, line: int | None
) -> None:
    answer = upload(client, filename, content)
    assert (answer.status_code, answer.json()["code"]) == (422, "dataset_invalid")
    assert answer.json()["problems"][0]["line"] == line
    assert files_below(storage) == []


def test_a_bomb_is_refused(settings: Settings, storage: Storage) -> None:
    limited = settings.model_copy(update={"max_expanded_bytes": 2**20})
    with TestClient(create_app(limited), base_url="http://127.0.0.1") as client:
        answer = upload(client, "a.txt.gz", gzip.compress(bytes(8 << 20)))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_expands_too_far")
    assert answer.json()["max_expanded_bytes"] == 2**20
    assert files_below(storage) == []


def test_a_tokenizer_comes_is_checked_used_and_goes(
    client: TestClient, storage: Storage, prepare: Callable[[], None]
) -> None:
    answer = send_tokenizer(client, TINY, ("tokenizer_config.json", b'{"eos_token": "<|endoftext|>"}'))
    assert answer.status_code == 201, answer.text
    tokenizer = answer.json()
    assert answer.headers["location"] == f"/tokenizers/{tokenizer['id']}"
    assert (tokenizer["status"], tokenizer["vocab_size"], tokenizer["source"]) == ("preparing", None, "upload")
    early = upload(client, "a.jsonl", LINES, tokenizer=tokenizer["id"])
    assert (early.status_code, early.json()["code"]) == (409, "tokenizer_not_ready")
    assert early.headers["retry-after"] == "5"
    prepare()
    ready = client.get(f"/tokenizers/{tokenizer['id']}").json()
    assert (ready["status"], ready["vocab_size"]) == ("ready", 3)
    assert client.get("/tokenizers").json() == {"data": [ready], "has_more": False}
    dataset = upload(client, "a.jsonl", LINES, tokenizer=tokenizer["id"]).json()
    assert [row["tokenizer"] for row in dataset["tokenizations"]] == ["bytes", tokenizer["id"]]
    in_use = client.delete(f"/tokenizers/{tokenizer['id']}")
    assert (in_use.status_code, in_use.json()["code"]) == (409, "tokenizer_in_use")
    assert in_use.json()["datasets"] == [dataset["id"]]
    prepare()
    other = upload(client, "b.jsonl", LINES).json()
    asked = client.post(f"/datasets/{other['id']}/tokenizations", json={"tokenizer": tokenizer["id"]})
    assert (asked.status_code, asked.json()["status"]) == (202, "pending")
    prepare()
    again = client.post(f"/datasets/{other['id']}/tokenizations", json={"tokenizer": tokenizer["id"]})
    assert (again.status_code, again.json()["status"]) == (202, "ready")
    assert client.delete(f"/tokenizers/{tokenizer['id']}").status_code == 204
    assert client.get(f"/tokenizers/{tokenizer['id']}").status_code == 404
    assert not storage.path(f"tokenizers/{tokenizer['id']}").exists()
    assert client.delete(f"/datasets/{dataset['id']}").status_code == 204
    assert not storage.path(f"datasets/{dataset['id']}").exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "is not valid JSON"),
        (b"\xff", "is not valid UTF-8"),
        (b"[" * 1_000_000, "is nested too deeply"),
        ([], "is not a JSON object"),
        ({}, 'has no "model"'),
        ({"model": {"type": "Markov", "vocab": {}}}, "whose type is none of"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, 'has no "model.vocab"'),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, 'has no "model.merges"'),
    ],
)
def test_what_is_no_tokenizer_is_refused_and_not_kept(
    shared_client: TestClient, shared_settings: Settings, value: Any, reason: str
) -> None:
    answer = send_tokenizer(shared_client, value)
    assert (answer.status_code, answer.json()["code"]) == (422, "tokenizer_invalid")
    assert reason in answer.json()["reason"]
    assert answer.json()["hint"]
    assert files_below(Storage(shared_settings.data_dir)) == []


def test_files_of_other_names_are_refused(shared_client: TestClient, shared_settings: Settings) -> None:
    for name, more in [("model.pt", ()), ("tokenizer.json", (("tokenizer.json", b"{}"),)), ("chat_template.jinja", ())]:
        answer = send_tokenizer(shared_client, TINY, *more, name=name)
        assert (answer.status_code, answer.json()["code"]) == (422, "tokenizer_invalid")
    assert files_below(Storage(shared_settings.data_dir)) == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"train": {"dataset": "ds_" + "0" * 32, "vocab_size": 300}}, 404, "dataset_not_found"),
        ({"train": {"dataset": "ds_" + "0" * 32, "vocab_size": 1}}, 422, "invalid_request"),
        ({"train": {"dataset": "ds_" + "0" * 32, "vocab_size": "300"}}, 422, "invalid_request"),
        ({"train": {}, "more": 1}, 422, "invalid_request"),
        (["train"], 422, "invalid_request"),
        ("[" * 60_000, 422, "invalid_request"),
        ("x" * 70_000, 413, "body_too_large"),
    ],
)
def test_a_training_that_cannot_be_is_refused(shared_client: TestClient, body: Any, status: int, code: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = shared_client.post("/tokenizers", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert len(answer.content) < 8_192


def test_a_tokenizer_trained_on_a_dataset_gives_a_model_its_vocabulary(
    client: TestClient, bind: Engine, prepare: Callable[[], None]
) -> None:
    dataset = upload(client, "a.jsonl", LINES).json()["id"]
    answer = client.post("/tokenizers", json={"train": {"dataset": dataset, "vocab_size": 300}, "name": "of mine"})
    assert (answer.status_code, answer.json()["source"], answer.json()["dataset"]) == (201, "trained", dataset)
    tokenizer = answer.json()["id"]
    in_use = client.delete(f"/datasets/{dataset}")
    assert (in_use.status_code, in_use.json()["tokenizers"]) == (409, [tokenizer])
    prepare()
    job = job_of(dataset, tokenizer=tokenizer, steps=None, epochs=2, sequence_length=4)
    for path in ("/plans", "/jobs"):  # both ask for the tokens, and keep nothing else
        early = client.post(path, json=job)
        assert (early.status_code, early.json()["code"]) == (409, "dataset_not_tokenized")
        assert early.headers["retry-after"] == "5"
        assert early.json()["tokenization_status"] == "pending"
    assert client.get("/jobs").json()["data"] == []
    prepare()
    created = client.post("/jobs", json=job)
    assert created.status_code == 202, created.text
    tokens = client.get(f"/datasets/{dataset}").json()["tokenizations"][1]["tokens"]
    body = created.json()
    assert body["progress"]["total_steps"] == 2 * ((tokens - 1) // 4)
    assert (body["tokenizer"], body["packing"], body["validation_fraction"]) == (tokenizer, "packed", None)
    with database.transaction(bind) as session:
        claimed = runs.claim(session, body["id"], "a worker", 60)
    assert claimed is not None
    assert claimed.model_config["vocab_size"] == client.get(f"/tokenizers/{tokenizer}").json()["vocab_size"]
    assert claimed.tokenizer_path == f"tokenizers/{tokenizer}"
    assert client.delete(f"/tokenizers/{tokenizer}").json()["jobs"] == [body["id"]]


def test_a_job_in_steps_does_not_wait_for_tokens(client: TestClient, prepare: Callable[[], None]) -> None:
    tokenizer = send_tokenizer(client).json()["id"]
    prepare()
    dataset = upload(client, "a.jsonl", LINES).json()["id"]
    assert client.post("/jobs", json=job_of(dataset, tokenizer=tokenizer)).status_code == 202
    rows = client.get(f"/datasets/{dataset}").json()["tokenizations"]
    assert [row["tokenizer"] for row in rows] == ["bytes", tokenizer]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokenizer": "tok_" + "0" * 32}, None),
        ({"validation_fraction": 0.6}, "validation_fraction"),
        ({"evaluate_every": 1}, "evaluate_every"),
        ({"packing": "loose"}, "packing"),
    ],
)
def test_what_does_not_go_together_is_refused(client: TestClient, changes: dict[str, Any], field: str | None) -> None:
    dataset = upload(client, "a.jsonl", LINES).json()["id"]
    answer = client.post("/plans", json=job_of(dataset, **changes))
    assert answer.status_code == (404 if field is None else 422)
    assert field in (None, answer.json().get("errors", [{}])[0].get("field"))


def test_a_share_of_the_documents_is_kept_for_validation(client: TestClient) -> None:
    dataset = upload(client, "a.jsonl", LINES).json()
    whole = client.post("/plans", json=job_of(dataset["id"], steps=None, epochs=1)).json()["total_steps"]
    assert whole == (dataset["tokens"] - 1) // 8
    body = job_of(dataset["id"], steps=None, epochs=1, validation_fraction=0.25, evaluate_every=1)
    assert client.post("/plans", json=body).json()["total_steps"] == round(whole * 0.75)
    job = client.post("/jobs", json=body).json()
    assert (job["validation_fraction"], job["evaluate_every"]) == (0.25, 1)
    alone = upload(client, "a.txt", b"one document " * 10).json()["id"]
    refused = client.post("/plans", json=job_of(alone, validation_fraction=0.5))
    assert refused.json()["errors"][0]["field"] == "validation_fraction"


def test_epochs_of_single_documents_count_their_windows(client: TestClient, prepare: Callable[[], None]) -> None:
    texts = ["a" * 3, "b" * 20, "c" * 9]  # and a border each: 1, 3 and 2 windows of 8 tokens and a last target
    content = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    dataset = upload(client, "a.jsonl", content).json()["id"]
    body = job_of(dataset, steps=None, epochs=1, packing="single")
    early = client.post("/plans", json=body)
    assert (early.status_code, early.json()["code"]) == (409, "dataset_not_tokenized")
    prepare()
    assert client.post("/plans", json=body).json()["total_steps"] == 6
    assert client.post("/plans", json=body | {"sequence_length": 64}).json()["total_steps"] == 3
