"""Keys, what they allow, and what an API without keys answers to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import httpx2
import pytest
import sqlalchemy
from sqlalchemy import Engine, func, select, update
from starlette.testclient import TestClient

from api import authentication, rates
from api.app import create_app
from service import keys, quotas
from service.database import transaction
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


def test_keys_cannot_be_guessed_quickly(keyed: TestClient, make_key: MakeKey, clock: list[float]) -> None:
    known, fresh = make_key(), make_key()
    assert keyed.get("/jobs", headers=known).status_code == 200
    wrong = [keyed.get("/jobs", headers={"Authorization": f"Bearer slim_{n:043}"}) for n in range(61)]
    assert [answer.status_code for answer in wrong] == [401] * 60 + [429]
    assert problem(wrong[-1], 429, "rate_limited")
    assert wrong[-1].headers["retry-after"] == "1"
    problem(keyed.get("/jobs", headers=fresh), 429, "rate_limited")  # else guesses would go on, and be told if right
    clock[0] += authentication.REMEMBER_SECONDS / 2
    assert keyed.get("/jobs", headers=known).status_code == 200  # whoever was here before is not kept out
    clock[0] += 60
    assert keyed.get("/jobs", headers=fresh).status_code == 200


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
