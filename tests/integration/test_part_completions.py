"""What holds while an upload in parts is put together: its claim, its parts, and everybody else's turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from anyio import to_thread
from sqlalchemy import Engine, func, select, update
from starlette.testclient import TestClient

from api.app import create_app
from api.openai import uploads as routes
from service import keys, part_completions, part_uploads
from service.database import transaction
from service.datasets import DatasetUpload
from service.limits import Limits
from service.models import PartUpload
from service.settings import Settings
from service.storage import Storage, parts_dir

LINE = b'{"text": "a line"}\n'
Headers = dict[str, str]


def begin(client: TestClient, parts: int = 3, headers: Headers | None = None) -> tuple[str, list[str]]:
    """An upload with its parts, of a line each."""
    announced = {"bytes": parts * len(LINE), "filename": "a.jsonl", "purpose": "fine-tune"}
    upload = client.post("/v1/uploads", json=announced, headers=headers).json()["id"]
    paths, files = f"/v1/uploads/{upload}/parts", {"data": ("part", LINE)}
    return upload, [client.post(paths, files=files, headers=headers).json()["id"] for _ in range(parts)]


def complete(client: TestClient, upload: tuple[str, list[str]], headers: Headers | None = None) -> httpx2.Response:
    return client.post(f"/v1/uploads/{upload[0]}/complete", json={"part_ids": upload[1]}, headers=headers)


def after_the_first_block(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[bytes]:
    """Have it done there; returns what is read from then on."""
    blocks: Callable[..., Iterator[bytes]] = part_completions._blocks
    later: list[bytes] = []

    def interrupted(*arguments: Any) -> Iterator[bytes]:
        read = blocks(*arguments)
        yield next(read)
        act()
        for block in read:
            later.append(block)
            yield block

    monkeypatch.setattr(part_completions, "_blocks", interrupted)
    return later


def change(bind: Engine, **values: Any) -> None:
    with transaction(bind) as session:
        session.execute(update(PartUpload).values(values))


def row(bind: Engine) -> PartUpload:
    with transaction(bind) as session:
        return session.scalars(select(PartUpload)).one()


def test_a_claim_is_renewed_while_the_parts_are_read(
    client: TestClient, bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond the upload's hour. Red where a claim is taken once, for however long the reading may be."""
    monkeypatch.setattr(part_completions, "RENEWAL_SECONDS", 0.0)
    upload = begin(client)
    over = func.clock_timestamp() - timedelta(minutes=2)
    seen: list[Any] = []

    def nearly_lapse() -> None:
        change(bind, expires_at=over, claimed_until=func.clock_timestamp() + timedelta(seconds=30))

    def look(*_arguments: Any) -> None:
        with transaction(bind) as session:
            left = PartUpload.claimed_until - func.clock_timestamp()
            seen.append((session.scalars(select(left)).one(), part_uploads.settle(bind, storage)))

    after_the_first_block(monkeypatch, nearly_lapse)
    monkeypatch.setattr(DatasetUpload, "store", spied(DatasetUpload.store, look))
    assert complete(client, upload).status_code == 200
    ((left, removed),) = seen
    assert left > timedelta(seconds=60)
    assert removed == []


def spied(method: Callable[..., Any], before: Callable[..., None]) -> Callable[..., Any]:
    def both(*arguments: Any, **named: Any) -> Any:
        before(*arguments)
        return method(*arguments, **named)

    return both


def test_who_has_lost_the_claim_stops_reading(
    client: TestClient, bind: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_completions, "RENEWAL_SECONDS", 0.0)
    upload = begin(client)
    later = after_the_first_block(monkeypatch, lambda: change(bind, claim="another's"))
    answer = complete(client, upload)
    assert (answer.status_code, answer.json()["code"]) == (409, "upload_being_completed")
    assert len(later) == 1  # of two
    assert row(bind).claim == "another's"


def test_parts_that_are_gone_are_a_conflict(
    client: TestClient, bind: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client)
    after_the_first_block(monkeypatch, lambda: storage.remove(parts_dir(upload[0])))
    answer = complete(client, upload)
    assert (answer.status_code, answer.json()["code"]) == (409, "upload_parts_gone")
    assert answer.headers["x-should-retry"] == "false"
    assert (row(bind).claim, row(bind).claimed_until) == (None, None)


def test_a_server_that_stops_gives_up_and_leaves_no_claim(
    settings: Settings, bind: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        upload = begin(client)
        later = after_the_first_block(monkeypatch, app.state.context.stopping.set)
        answer = complete(client, upload)
    assert (answer.status_code, answer.json()["code"]) == (503, "upload_interrupted")
    assert answer.headers["x-should-retry"] == "true"
    assert len(later) == 1
    assert row(bind).claim is None


def test_what_takes_too_long_to_read_is_refused(settings: Settings, bind: Engine) -> None:
    hasty = settings.model_copy(update={"read_seconds": 1e-9})
    with TestClient(create_app(hasty), base_url="http://127.0.0.1") as client:
        answers = [complete(client, begin(client))]
        answers += [client.post("/datasets", files={"file": ("a.jsonl", LINE)})]
        answers += [client.post("/v1/files", files={"file": ("a.jsonl", LINE)}, data={"purpose": "fine-tune"})]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(413, "upload_takes_too_long")] * 3
    assert row(bind).claim is None


@pytest.fixture
def keyed(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as running:
        yield running


@pytest.fixture
def tenants(bind: Engine) -> list[Headers]:
    """Of two tenants."""
    with transaction(bind) as session:
        made = [keys.create(session, name, "a key", Limits())[1] for name in ("one", "other")]
    return [{"Authorization": f"Bearer {key}"} for key in made]


def test_a_tenants_long_completions_hold_up_nobody_else(
    keyed: TestClient, tenants: list[Headers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where they run on threads that others wait for."""
    one, other = tenants
    monkeypatch.setattr(routes, "WAIT_SECONDS", 0.1)
    slow, second = begin(keyed, headers=one), begin(keyed, headers=one)
    theirs = begin(keyed, headers=other)
    reading, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        if not reading.is_set():
            reading.set()
            assert go_on.wait(30)

    after_the_first_block(monkeypatch, wait)
    with ThreadPoolExecutor(3) as pool:
        try:
            first = pool.submit(complete, keyed, slow, one)
            assert reading.wait(30)
            busy = pool.submit(complete, keyed, second, one).result(20)
            assert (busy.status_code, busy.json()["code"]) == (429, "too_many_completions")
            assert busy.headers["retry-after"] == "10"
            assert pool.submit(complete, keyed, theirs, other).result(20).status_code == 200
        finally:
            go_on.set()
        assert first.result(30).status_code == 200
    assert complete(keyed, second, one).status_code == 200


def test_a_tenants_slow_files_hold_no_common_thread(
    keyed: TestClient, tenants: list[Headers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where what is read of them takes the threads that all routes have together: here two."""
    one, other = tenants
    write = DatasetUpload.write
    reading, go_on = threading.Semaphore(0), threading.Event()

    def slow(self: DatasetUpload, data: bytes) -> None:
        if self.filename == "slow.txt":
            reading.release()
            assert go_on.wait(30)
        write(self, data)

    async def keep_two() -> None:
        to_thread.current_default_thread_limiter().total_tokens = 2

    def send(name: str, headers: Headers) -> httpx2.Response:
        return keyed.post("/datasets", files={"file": (name, b"text")}, headers=headers)

    monkeypatch.setattr(DatasetUpload, "write", slow)
    assert keyed.portal is not None
    keyed.portal.call(keep_two)
    with ThreadPoolExecutor(4) as pool:
        try:
            blocked: list[Future[httpx2.Response]] = [pool.submit(send, "slow.txt", one) for _ in range(3)]
            assert all(reading.acquire(timeout=30) for _ in range(2))
            assert pool.submit(send, "a.txt", other).result(20).status_code == 201
        finally:
            go_on.set()
        assert [answer.result(30).status_code for answer in blocked] == [201] * 3


def test_a_part_that_is_refused_leaves_neither_file_nor_descriptor(client: TestClient, storage: Storage) -> None:
    upload, _ = begin(client)
    path = f"/v1/uploads/{upload}/parts"
    opened: list[Any] = []
    upload_file = Storage.upload

    def noted(self: Storage, limit_bytes: int) -> Any:
        opened.append(upload_file(self, limit_bytes))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "upload", noted)
        refused = [
            client.post(path, json={}),
            client.post(path, files={"other": ("part", LINE)}),
            client.post(path, files=[("data", ("part", LINE)), ("data", ("part", LINE))]),
            client.post(path, files={"data": ("part", LINE)}, data={"name": "no such field"}),
            client.post(path, files={"data": ("part", b"")}),
            client.post(path, files={"data": ("part", LINE * 100)}),
        ]
    assert {answer.status_code for answer in refused} == {413, 422}
    assert all(file._file.closed for file in opened)
    assert list(storage.path("tmp").iterdir()) == []
