"""Keys, what they allow, and what an API without keys answers to."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx2
import pytest
import sqlalchemy
from sqlalchemy import Engine, func, select, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from starlette.types import Scope

from api import authentication, rates
from api.app import create_app
from api.authentication import Authenticator
from api.errors import RateLimitedError, UnauthorizedError
from service import keys, quotas
from service.database import transaction
from service.errors import ServiceError
from service.limits import Limits
from service.models import ApiKey, Dataset, Job
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim

JOB = {"model": "performer-tiny", "memory_cap": "500MiB", "sequence_length": 128, "steps": 2}
MakeKey = Callable[..., dict[str, str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by which keys are remembered and requests are counted, in seconds."""
    now = [1_000.0]
    for module in (authentication, rates):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def keyed(settings: Settings) -> Iterator[TestClient]:
    """An API that asks for keys, as it looks from anywhere."""
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as running:
        yield running


@pytest.fixture
def make_key(bind: Engine) -> MakeKey:
    """Makes a key; returns the header that has it."""

    def make(tenant: str = "acme", expires_days: float | None = None, **limits: int) -> dict[str, str]:
        with transaction(bind) as session:
            _, key = keys.create(session, tenant, "a key", Limits(**limits), expires_days)
        return {"Authorization": f"Bearer {key}"}

    return make


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    return body


def test_a_key_opens_and_nothing_else_does(keyed: TestClient, make_key: MakeKey, bind: Engine) -> None:
    key = make_key()["Authorization"].removeprefix("Bearer ")
    assert re.fullmatch(r"slim_[A-Za-z0-9_-]{43}", key)
    assert keyed.get("/jobs", headers={"Authorization": f"bearer {key}"}).status_code == 200
    expired = make_key(expires_days=0.0)
    changed = {"Authorization": f"Bearer {key[:-2]}{'AA' if key[-2:] != 'AA' else 'BB'}"}
    nothing: dict[str, str] = {}
    refused = [nothing, expired, changed, {"Authorization": key}, {"Authorization": f"Basic {key}"}]
    answers = [keyed.get("/jobs", headers=headers) for headers in refused]
    bodies = [problem(answer, 401, "unauthorized") for answer in answers]
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    assert len({body["detail"] for body in bodies}) == 1
    for path in ("/healthz", "/openapi.json", "/docs"):
        assert keyed.get(path).status_code == 200
    for path in ("/nothing", "/healthz/", "/healthz%0a", "/openapi.json/x"):
        problem(keyed.get(path), 401, "unauthorized")


def test_the_database_has_no_key(make_key: MakeKey, bind: Engine) -> None:
    key = make_key()["Authorization"].removeprefix("Bearer ")
    with bind.connect() as connection:
        row = str(connection.execute(sqlalchemy.text("SELECT * FROM api_keys")).one())
    assert keys.digest(key) in row
    assert key[:11] in row
    assert key[:12] not in row


def test_a_revocation_takes_effect_within_seconds(
    keyed: TestClient, make_key: MakeKey, bind: Engine, clock: list[float]
) -> None:
    headers = make_key()
    assert keyed.get("/jobs", headers=headers).status_code == 200
    with transaction(bind) as session:
        keys.revoke(session, keys.listed(session)[0].id)
    clock[0] += authentication.REMEMBER_SECONDS / 2
    assert keyed.get("/jobs", headers=headers).status_code == 200
    clock[0] += authentication.REMEMBER_SECONDS
    problem(keyed.get("/jobs", headers=headers), 401, "unauthorized")


def test_last_used_is_noted_once_a_minute(
    keyed: TestClient, make_key: MakeKey, bind: Engine, clock: list[float]
) -> None:
    headers = make_key()

    def noted() -> Any:
        keyed.get("/jobs", headers=headers)
        with transaction(bind) as session:
            return session.scalars(select(ApiKey.last_used_at)).one()

    first = noted()
    assert first is not None
    with transaction(bind) as session:  # as if it had been two minutes ago
        session.execute(update(ApiKey).values(last_used_at=func.now() - timedelta(minutes=2)))
    assert noted() < first
    clock[0] += keys.LAST_USED_SECONDS
    assert noted() > first


def asking(headers: dict[str, str], peer: str = "10.0.0.1") -> Scope:
    sent = [(b"authorization", headers["Authorization"].encode())]
    return {"type": "http", "headers": sent, "client": (peer, 1)}


def wrong(number: int) -> dict[str, str]:
    return {"Authorization": f"Bearer slim_{number:043}"}


def test_wrong_keys_are_slowed_down_and_keep_nobody_out(
    keyed: TestClient, make_key: MakeKey, clock: list[float]
) -> None:
    """The address may be that of a proxy, before everybody."""
    answers = [keyed.get("/jobs", headers=wrong(number)) for number in range(61)]
    assert [answer.status_code for answer in answers] == [401] * 60 + [429]
    assert problem(answers[-1], 429, "rate_limited")
    assert answers[-1].headers["retry-after"] == "1"
    assert keyed.get("/jobs", headers={"Authorization": "Bearer no key at all"}).status_code == 429
    assert keyed.get("/jobs", headers=make_key()).status_code == 200
    clock[0] += 60
    assert keyed.get("/jobs", headers=wrong(0)).status_code == 401


def test_of_ipv6_a_network_counts_and_of_ipv4_an_address(bind: Engine) -> None:
    async def steps() -> None:
        authenticator = Authenticator(bind)

        async def ask(peer: str) -> str:
            with pytest.raises(ServiceError) as refused:
                await authenticator.caller(asking({"Authorization": "Bearer x"}, peer))
            return refused.value.code

        for peer in ("::ffff:10.0.0.1", "2001:db8::1"):
            assert {await ask(peer) for _ in range(60)} == {"unauthorized"}
        assert [await ask(peer) for peer in ("10.0.0.1", "2001:db8::2")] == ["rate_limited"] * 2
        assert [await ask(peer) for peer in ("::ffff:10.0.0.2", "2001:db8:0:1::1")] == ["unauthorized"] * 2

    asyncio.run(steps())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hashes that were asked for in the database."""
    found, find = list[str](), keys.find

    def noted(session: Session, sha256: str) -> Any:
        found.append(sha256)
        return find(session, sha256)

    monkeypatch.setattr(keys, "find", noted)
    return found


def test_a_burst_with_a_new_key_is_one_look_and_nobody_is_refused(
    bind: Engine, make_key: MakeKey, looks: list[str]
) -> None:
    headers = make_key()

    async def steps() -> None:
        authenticator = Authenticator(bind)
        given_up = asyncio.create_task(authenticator.caller(asking(headers)))
        waiting = [asyncio.create_task(authenticator.caller(asking(headers))) for _ in range(100)]
        await asyncio.sleep(0)  # all of them have begun
        given_up.cancel()
        assert {caller.tenant for caller in await asyncio.gather(*waiting)} == {"acme"}

    asyncio.run(steps())
    assert len(looks) == 1


@pytest.mark.parametrize("one_address", [False, True])
def test_a_crowd_of_wrong_keys_takes_few_threads_and_holds_no_other_up(
    bind: Engine, make_key: MakeKey, clock: list[float], monkeypatch: pytest.MonkeyPatch, one_address: bool
) -> None:
    known, fresh = make_key(), make_key()
    right = {keys.digest(key["Authorization"].removeprefix("Bearer ")) for key in (known, fresh)}
    find, held, may_go = keys.find, list[str](), threading.Event()

    def slow(session: Session, sha256: str) -> Any:
        if sha256 not in right:
            held.append(sha256)
            assert may_go.wait(30)
        return find(session, sha256)

    monkeypatch.setattr(keys, "find", slow)

    async def steps() -> None:
        authenticator = Authenticator(bind)
        await authenticator.caller(asking(known))
        peers = [f"10.0.{0 if one_address else number}.1" for number in range(100)]
        if one_address:  # which has got so many wrong already
            for _ in range(60):
                with pytest.raises(UnauthorizedError):
                    await authenticator.caller(asking({"Authorization": "Bearer x"}, peers[0]))
        crowd = [authenticator.caller(asking(wrong(number), peer)) for number, peer in enumerate(peers)]
        refused = asyncio.gather(*crowd, return_exceptions=True)
        await asyncio.sleep(0)  # all of them have begun
        try:
            for _ in range(5):
                clock[0] += authentication.REMEMBER_SECONDS + 0.001
                assert (await authenticator.caller(asking(known))).tenant == "acme"
            if one_address:
                assert (await authenticator.caller(asking(fresh, "10.1.0.1"))).tenant == "acme"
            assert len(held) <= (1 if one_address else 2)
        finally:
            may_go.set()
        assert {type(error) for error in await refused} <= {UnauthorizedError, RateLimitedError}

    asyncio.run(steps())
    assert len(held) == 100


def test_requests_a_minute(keyed: TestClient, make_key: MakeKey, clock: list[float]) -> None:
    headers = make_key(requests_per_minute=3)
    answers = [keyed.get("/jobs", headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["ratelimit"] for answer in answers] == [
        '"requests";r=2;t=20',
        '"requests";r=1;t=40',
        '"requests";r=0;t=60',
        '"requests";r=0;t=60',
    ]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"requests";q=3;w=60'}
    assert answers[3].headers["retry-after"] == "20"
    problem(answers[3], 429, "rate_limited")
    clock[0] += 20
    assert keyed.get("/jobs", headers=headers).status_code == 200
    assert keyed.get("/jobs", headers=make_key(requests_per_minute=3)).status_code == 200  # another key, another count


def test_jobs_are_limited_exactly(keyed: TestClient, make_key: MakeKey, bind: Engine, storage: Storage) -> None:
    """Without the lock in service/quotas.py more than three of them get through."""
    headers = make_key(max_jobs=3)
    body = {**JOB, "dataset": add_dataset(bind, storage, tenant="acme").id}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: keyed.post("/jobs", json=body, headers=headers), range(20)))
    assert sorted(answer.status_code for answer in answers) == [202] * 3 + [429] * 17
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert problem(refused, 429, "too_many_jobs")["max_jobs"] == 3
    assert keyed.post("/jobs", json=body, headers=make_key()).status_code == 202  # a key without the limit
    job = next(answer.json()["id"] for answer in answers if answer.status_code == 202)
    for action in ("pause", "resume"):
        assert keyed.post(f"/jobs/{job}/{action}", headers=headers).status_code == 200
    with transaction(bind) as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 4


def test_bytes_are_limited_exactly(keyed: TestClient, make_key: MakeKey, bind: Engine, storage: Storage) -> None:
    """Without the lock in service/quotas.py both uploads get through. What is refused leaves no file."""
    headers = make_key(max_bytes=10_000)

    def upload(_: int) -> httpx2.Response:
        return keyed.post("/datasets", files={"file": ("a.txt", b"x" * 6_000)}, headers=headers)

    with ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(upload, range(2)), key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [201, 413]
    body = problem(answers[1], 413, "storage_quota_exceeded")
    assert (body["bytes_in_use"], body["added_bytes"], body["max_bytes"]) == (6_000, 6_000, 10_000)
    with transaction(bind) as session:
        stored = session.scalars(select(Dataset.id)).all()
    assert [path.name for path in storage.path("datasets").iterdir()] == list(stored)
    assert not list(storage.path("tmp").iterdir())


def test_checkpoints_count_and_stop_new_jobs(
    keyed: TestClient, make_key: MakeKey, bind: Engine, storage: Storage
) -> None:
    """They stop no job that runs, of which they are."""
    dataset = add_dataset(bind, storage, tenant="acme")
    run = claim(bind, add_job(bind, dataset.id, tenant="acme").id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, run, 1)
    with transaction(bind, "acme") as session:
        written = quotas.bytes_in_use(session) - dataset.bytes
        assert written == sum(path.stat().st_size for path in storage.path(run.checkpoints_dir).rglob("*.*"))
    body = {**JOB, "dataset": dataset.id}
    full = make_key(max_bytes=dataset.bytes + written)
    assert problem(keyed.post("/jobs", json=body, headers=full), 413, "storage_quota_exceeded")
    train = {"train": {"dataset": dataset.id, "vocab_size": 512}}
    assert problem(keyed.post("/tokenizers", json=train, headers=full), 413, "storage_quota_exceeded")
    assert keyed.post("/jobs", json=body, headers=make_key(max_bytes=dataset.bytes + written + 1)).status_code == 202
    with transaction(bind) as session:
        add_checkpoint(session, storage, run, 2)


def test_what_is_announced_as_too_much_is_not_read(keyed: TestClient, make_key: MakeKey) -> None:
    headers = make_key(max_bytes=10_000) | {"Content-Length": "1000000", "Content-Type": "multipart/form-data"}

    read = []

    def body() -> Iterator[bytes]:
        read.append(True)
        yield b""

    for path in ("/datasets", "/tokenizers", "/models"):
        problem(keyed.post(path, content=body(), headers=headers), 413, "storage_quota_exceeded")
    assert not read


LOCAL = "http://127.0.0.1:8000"


def without_keys(settings: Settings, base: str) -> TestClient:
    return TestClient(create_app(settings), base_url=base)


@pytest.mark.parametrize("base", [LOCAL, "http://localhost:8000", "http://[::1]:8000", "http://127.8.9.1"])
def test_without_keys_this_machine_is_served(settings: Settings, base: str) -> None:
    with without_keys(settings, base) as client:
        assert client.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    ("base", "headers"),
    [
        ("http://192.168.1.5:8000", {}),
        ("http://192.168.1.5:8000", {"Host": "localhost"}),
        (LOCAL, {"Host": "attacker.example"}),
        (LOCAL, {"Host": "localhost.attacker.example"}),
        (LOCAL, {"Host": ""}),
        (LOCAL, {"X-Forwarded-For": "203.0.113.9"}),
    ],
)
def test_without_keys_nobody_else_is(settings: Settings, base: str, headers: dict[str, str]) -> None:
    with without_keys(settings, base) as client:
        body = problem(client.get("/jobs", headers=headers), 403, "keys_required")
        assert "slimtune keys create" in body["detail"]
        assert client.get("/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9000"}, True),
        ({"Origin": "https://attacker.example"}, True),
        ({"Origin": "null"}, True),
        ({"Origin": "http://["}, True),
        ({"Origin": "127.0.0.1:8000"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": LOCAL}, False),
        ({"Sec-Fetch-Site": "none"}, False),
    ],
)
def test_a_page_of_another_site_changes_nothing(settings: Settings, headers: dict[str, str], refused: bool) -> None:
    with without_keys(settings, LOCAL) as client:
        answer = client.post("/jobs", headers=headers)
        assert answer.status_code == (403 if refused else 422)
        assert (answer.json()["code"] == "cross_site_refused") is refused
        assert client.get("/jobs", headers=headers).status_code == 200


def test_no_answer_lets_another_site_read_it(settings: Settings) -> None:
    headers = {"Origin": "https://attacker.example", "Access-Control-Request-Method": "POST"}
    with without_keys(settings, LOCAL) as client:
        for answer in (client.get("/jobs", headers=headers), client.options("/jobs", headers=headers)):
            assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("host", "chosen", "required"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),  # noqa: S104  # what is tested
        ("10.0.0.7", None, True),
        ("example.org", None, True),
        ("127.0.0.1", "keys", True),
        ("0.0.0.0", "none", False),  # noqa: S104  # what is tested
    ],
)
def test_who_listens_where_others_are_asks_for_keys(settings: Settings, host: str, chosen: Any, required: bool) -> None:
    changed = settings.model_copy(update={"host": host, "authentication": chosen})
    assert changed.keys_required is required
