"""Files and uploads in parts under /v1, through OpenAI's own client."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, func, select, update
from starlette.testclient import TestClient

from api.middleware import MAX_JSON_BYTES
from service import datasets, jobs, part_completions, part_uploads
from service.database import transaction
from service.errors import UploadStateError
from service.models import Dataset, PartUpload
from service.part_completions import Wanted
from service.settings import Settings
from service.storage import Storage
from tests.integration.openai_client import openai_over
from tests.integration.seed import add_job

LINES = b"".join(json.dumps({"text": f"line {number}, of some length"}).encode() + b"\n" for number in range(200))
NAME = "train.jsonl"
MIME = "application/jsonl"


@pytest.fixture
def api(client: TestClient) -> OpenAI:
    return openai_over(client)


def files_below(storage: Storage) -> list[str]:
    if not storage.root.is_dir():
        return []
    return sorted(str(path.relative_to(storage.root)) for path in storage.root.rglob("*") if path.is_file())


def test_a_file_is_a_dataset(api: OpenAI, client: TestClient, storage: Storage) -> None:
    file = api.files.create(file=(NAME, LINES), purpose="fine-tune")
    assert (file.object, file.purpose, file.filename, file.bytes) == ("file", "fine-tune", NAME, len(LINES))
    assert (file.status, file.expires_at) == ("uploaded", None)
    assert client.get(f"/datasets/{file.id}").json()["documents"] == 200
    assert api.files.retrieve(file.id) == file
    content = api.files.content(file.id)
    assert content.content == LINES
    assert content.response.headers["etag"] == f'"{hashlib.sha256(LINES).hexdigest()}"'
    assert content.response.headers["content-disposition"] == f'attachment; filename="{file.id}.jsonl"'
    part = client.get(f"/v1/files/{file.id}/content", headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, LINES[5:10])
    assert api.files.delete(file.id).model_dump() == {"id": file.id, "object": "file", "deleted": True}
    with pytest.raises(openai.NotFoundError) as gone:
        api.files.retrieve(file.id)
    assert gone.value.code == "dataset_not_found"
    assert files_below(storage) == []


def test_fields_come_in_any_order_and_unknown_ones_are_refused(client: TestClient) -> None:
    def send(*fields: tuple[str, Any]) -> Any:
        return client.post("/v1/files", files=list(fields))

    file, purpose = ("file", (NAME, LINES)), ("purpose", (None, "fine-tune"))
    expiry = (("expires_after[anchor]", (None, "created_at")), ("expires_after[seconds]", (None, "3600")))
    for fields in ((purpose, *expiry, file), (file, *expiry, purpose)):
        answer = send(*fields).json()
        assert answer["expires_at"] - answer["created_at"] == 3_600
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((file,), "purpose"),
        ((file, ("purpose", (None, "batch"))), "purpose"),
        ((purpose,), "file"),
        ((purpose, file, expiry[0]), "expires_after"),
        ((purpose, file, expiry[0], ("expires_after[seconds]", (None, "3599"))), "expires_after"),
        ((purpose, file, ("expires_after[other]", (None, "1"))), "expires_after[other]"),
    ]
    for fields, param in refused:
        problem = send(*fields)
        assert (problem.status_code, problem.json()["error"]["param"]) == (422, param)
    # The fields are this route's: the native one knows none of them.
    assert client.post("/datasets", files=[file, purpose]).json()["error"]["param"] == "purpose"
    assert client.post("/datasets", files=[("data", (NAME, LINES))]).status_code == 422


def test_files_are_paged_both_ways(api: OpenAI) -> None:
    ids = [api.files.create(file=(f"{number}.txt", b"text"), purpose="fine-tune").id for number in range(3)]
    assert [file.id for file in api.files.list(limit=1)] == ids[::-1]
    assert [file.id for file in api.files.list(limit=2, order="asc", purpose="fine-tune")] == ids
    assert list(api.files.list(purpose="batch")) == []
    page = api.files.list(limit=10_000).model_dump()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", False, ids[2], ids[0])


def test_what_is_broken_is_said_in_openais_exceptions(api: OpenAI, storage: Storage) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as broken:
        api.files.create(file=(NAME, b'{"text": 1}\n'), purpose="fine-tune")
    assert broken.value.code == "dataset_invalid"
    assert broken.value.request_id is not None
    assert broken.value.request_id.startswith("req_")
    with pytest.raises(openai.UnprocessableEntityError, match="must end in"):
        api.files.create(file=b"text", purpose="fine-tune")  # which the client calls `upload`
    assert files_below(storage) == []


def test_a_file_whose_time_is_over_goes_unless_a_job_reads_it(api: OpenAI, bind: Engine, storage: Storage) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    read, unread = (
        api.files.create(file=("a.txt", b"x" * 500), purpose="fine-tune", expires_after=expiry).id for _ in range(2)
    )
    kept = api.files.create(file=("a.txt", b"text"), purpose="fine-tune").id
    job = add_job(bind, read)
    assert datasets.remove_expired(bind, storage) == []
    with transaction(bind) as session:
        past = Dataset.created_at - timedelta(days=1)
        session.execute(update(Dataset).where(Dataset.expires_at.is_not(None)).values(expires_at=past))
    assert datasets.remove_expired(bind, storage) == [unread]
    with transaction(bind) as session:
        jobs.request(session, job.id, "cancel")
    assert datasets.remove_expired(bind, storage) == [read]
    assert [file.id for file in api.files.list()] == [kept]
    assert files_below(storage) == [f"datasets/{kept}/data.txt"]


def begin(api: OpenAI, size: int = len(LINES), name: str = NAME) -> str:
    return api.uploads.create(bytes=size, filename=name, mime_type=MIME, purpose="fine-tune").id


def send(api: OpenAI, upload_id: str, *parts: bytes) -> list[str]:
    return [api.uploads.parts.create(upload_id, data=part).id for part in parts]


def halves() -> tuple[bytes, bytes]:
    middle = LINES.index(b"\n", len(LINES) // 2) - 7
    return LINES[:middle], LINES[middle:]


def test_a_file_in_parts(api: OpenAI, storage: Storage, tmp_path: Any) -> None:
    path = tmp_path / NAME
    path.write_bytes(LINES)
    digest = hashlib.md5(LINES, usedforsecurity=False).hexdigest()
    upload = api.uploads.upload_file_chunked(
        file=path, mime_type=MIME, purpose="fine-tune", part_size=1_000, md5=digest
    )
    assert (upload.object, upload.status, upload.bytes) == ("upload", "completed", len(LINES))
    assert upload.expires_at - upload.created_at >= 3_600
    assert upload.file is not None
    assert (upload.file.filename, upload.file.bytes) == (NAME, len(LINES))
    assert api.files.content(upload.file.id).content == LINES
    assert files_below(storage) == [f"datasets/{upload.file.id}/data.jsonl"]


def test_a_part_may_be_larger_than_a_json_body(api: OpenAI, settings: Settings) -> None:
    text = b"x" * settings.max_upload_bytes
    assert len(text) > MAX_JSON_BYTES
    upload_id = begin(api, size=len(text), name="a.txt")
    completed = api.uploads.complete(upload_id, part_ids=send(api, upload_id, text))
    assert completed.file is not None
    assert completed.file.bytes == api.files.create(file=("a.txt", text), purpose="fine-tune").bytes == len(text)


def test_parts_are_put_together_in_the_order_that_is_said_and_only_once(api: OpenAI) -> None:
    upload_id = begin(api)
    second, first = send(api, upload_id, *halves()[::-1])
    completed = api.uploads.complete(upload_id, part_ids=[first, second])
    assert completed.file is not None
    assert api.uploads.complete(upload_id, part_ids=[first, second]) == completed
    assert [file.id for file in api.files.list()] == [completed.file.id]
    assert api.files.content(completed.file.id).content == LINES
    late_requests: list[Callable[[], object]] = [
        lambda: send(api, upload_id, b"more"),
        lambda: api.uploads.cancel(upload_id),
    ]
    for late in late_requests:
        with pytest.raises(openai.ConflictError) as refused:
            late()
        assert refused.value.code == "upload_state_conflict"
        assert refused.value.response.headers["x-should-retry"] == "false"


def test_what_is_not_the_announced_file_is_refused_and_can_be_put_right(api: OpenAI, storage: Storage) -> None:
    upload_id = begin(api)
    first, second = send(api, upload_id, *halves())
    digest, half = (hashlib.md5(text, usedforsecurity=False).hexdigest() for text in (LINES, halves()[0]))
    refusals: list[tuple[list[str], str, type[openai.APIStatusError], str]] = [
        ([first], half, openai.UnprocessableEntityError, "upload_mismatch"),
        ([first, first], digest, openai.UnprocessableEntityError, "upload_mismatch"),
        ([first, second], "0" * 32, openai.UnprocessableEntityError, "upload_mismatch"),
        ([second, first], digest, openai.UnprocessableEntityError, "upload_mismatch"),
        ([first, "part_" + "0" * 32], digest, openai.NotFoundError, "part_not_found"),
    ]
    for part_ids, md5, kind, code in refusals:
        with pytest.raises(kind) as refused:
            api.uploads.complete(upload_id, part_ids=part_ids, md5=md5)
        assert refused.value.code == code
    with pytest.raises(openai.UnprocessableEntityError) as disordered:
        api.uploads.complete(upload_id, part_ids=[second, first])
    assert disordered.value.code == "dataset_invalid"
    assert [name for name in files_below(storage) if not name.startswith("parts/")] == []
    assert api.uploads.complete(upload_id, part_ids=[first, second], md5=digest.upper()).status == "completed"


def test_parts_have_limits(api: OpenAI, storage: Storage, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    upload_id = begin(api, size=10)
    monkeypatch.setattr(part_uploads, "MAX_PARTS", 2)
    with pytest.raises(openai.UnprocessableEntityError, match="empty"):
        send(api, upload_id, b"")
    with pytest.raises(openai.APIStatusError) as large:
        send(api, upload_id, b"x" * 11)
    assert (large.value.status_code, large.value.code) == (413, "upload_too_large")
    send(api, upload_id, b"x" * 10, b"x" * 9)  # the first one's answer may have been lost
    with pytest.raises(openai.UnprocessableEntityError, match="2 parts, which is the most"):
        send(api, upload_id, b"x")
    with pytest.raises(openai.NotFoundError):
        send(api, "upload_" + "0" * 32, b"x")
    with pytest.raises(openai.APIStatusError) as huge:
        begin(api, size=settings.max_upload_bytes + 1)
    assert huge.value.code == "upload_too_large"
    with pytest.raises(openai.UnprocessableEntityError, match="must end in"):
        begin(api, name="a.pdf")
    assert len(files_below(storage)) == 2
    monkeypatch.setattr(part_uploads, "MAX_OPEN", 1)
    with pytest.raises(openai.RateLimitError) as many:
        begin(api)
    assert many.value.response.headers["x-should-retry"] == "false"
    api.uploads.cancel(upload_id)
    assert api.uploads.cancel(upload_id).status == "cancelled"
    assert files_below(storage) == []
    begin(api)


def expire(bind: Engine, upload_id: str, ago: timedelta) -> None:
    with transaction(bind) as session:
        session.execute(
            update(PartUpload).where(PartUpload.id == upload_id).values(expires_at=func.clock_timestamp() - ago)
        )


def test_parts_of_an_upload_that_has_expired_are_swept(api: OpenAI, bind: Engine, storage: Storage) -> None:
    expired, alive = begin(api), begin(api)
    (part,) = send(api, expired, LINES)
    send(api, alive, LINES)
    assert part_uploads.settle(bind, storage) == []
    expire(bind, expired, timedelta(seconds=30))
    with pytest.raises(openai.ConflictError, match="expired"):
        api.uploads.complete(expired, part_ids=[part])
    assert part_uploads.settle(bind, storage) == []  # a request that came in time may be about to claim it
    expire(bind, expired, timedelta(seconds=61))
    assert part_uploads.settle(bind, storage) == [expired]
    assert [name.split("/")[1] for name in files_below(storage)] == [alive]
    with transaction(bind) as session:
        session.execute(update(PartUpload).values(expires_at=func.now() - timedelta(days=2)))
    part_uploads.settle(bind, storage)
    with pytest.raises(openai.NotFoundError):
        api.uploads.cancel(alive)
    assert files_below(storage) == []


def test_a_completion_that_fails_lengthens_no_hour(api: OpenAI, bind: Engine, storage: Storage) -> None:
    upload_id = begin(api)
    parts = send(api, upload_id, LINES)
    expire(bind, upload_id, timedelta(minutes=-5))

    def ends_at() -> Any:
        with transaction(bind) as session:
            return session.scalars(select(PartUpload.expires_at)).one()

    before = ends_at()
    with pytest.raises(openai.UnprocessableEntityError):
        api.uploads.complete(upload_id, part_ids=parts, md5="0" * 32)
    assert ends_at() == before


def test_two_completions_at_once_make_one_file(
    api: OpenAI, settings: Settings, bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red without the claim, and with a dataset whose transaction is not that of the upload's end."""
    upload_id = begin(api)
    parts = send(api, upload_id, *halves())
    reading, go_on = threading.Event(), threading.Event()
    blocks: Callable[..., Any] = part_completions._blocks

    def slowly(*arguments: Any) -> Any:
        read = list(blocks(*arguments))
        reading.set()
        assert go_on.wait(30)
        return read

    monkeypatch.setattr(part_completions, "_blocks", slowly)

    def complete() -> Any:
        return part_completions.complete(bind, storage, settings, Wanted(upload_id, parts, None), "default")

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(complete)
        assert reading.wait(30)
        others: list[Callable[[], object]] = [
            lambda: api.uploads.complete(upload_id, part_ids=parts),
            lambda: api.uploads.cancel(upload_id),
        ]
        for other in others:
            with pytest.raises(openai.ConflictError) as busy:
                other()
            assert busy.value.code == "upload_being_completed"
            assert busy.value.response.headers["x-should-retry"] == "true"
        # Were the first request held to have died, the second one would win, and the first make nothing.
        with transaction(bind) as session:
            session.execute(update(PartUpload).values(claimed_until=func.now() - timedelta(seconds=1)))
        monkeypatch.setattr(part_completions, "_blocks", blocks)
        second = api.uploads.complete(upload_id, part_ids=parts)
        go_on.set()
        with pytest.raises(UploadStateError):
            first.result(30)
    assert second.file is not None
    assert [file.id for file in api.files.list()] == [second.file.id]
