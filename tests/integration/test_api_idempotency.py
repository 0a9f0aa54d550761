"""POST /jobs with an Idempotency-Key: what is done once, and what is not stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from typing import Any

import httpx2
import pytest
import redis
from sqlalchemy import Engine, func, select, text, update
from starlette.testclient import TestClient

from cli.embedded import EmbeddedServers
from service import database, idempotency, queue
from service.database import transaction
from service.errors import IdempotencyKeyInFlightError, IdempotencyKeyReusedError
from service.idempotency import Created
from service.models import IdempotencyKey, Job
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_dataset
from worker import sweeper

Post = Callable[..., httpx2.Response]
KEY = "0ab6f1d2-once"


@pytest.fixture
def body(bind: Engine, storage: Storage) -> dict[str, Any]:
    dataset = add_dataset(bind, storage).id
    return {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 128, "steps": 10}


@pytest.fixture
def post(client: TestClient, body: dict[str, Any]) -> Post:
    def post(key: str = KEY, **changes: Any) -> httpx2.Response:
        return client.post("/jobs", json={**body, **changes}, headers={"Idempotency-Key": key})

    return post


def count(bind: Engine, table: type[Job | IdempotencyKey]) -> int:
    with transaction(bind) as session:
        return session.scalars(select(func.count()).select_from(table)).one()


def age(bind: Engine, key: str, by: timedelta) -> None:
    with transaction(bind) as session:
        mine = update(IdempotencyKey).where(IdempotencyKey.key == key)
        session.execute(mine.values(created_at=IdempotencyKey.created_at - by))


def test_a_repeated_request_gets_the_answer_of_the_first(
    post: Post, client: TestClient, bind: Engine, servers: EmbeddedServers
) -> None:
    first = post(metadata={"name": "Zoë"})
    assert first.status_code == 202
    assert "idempotency-replayed" not in first.headers
    client.post(f"/jobs/{first.json()['id']}/cancel")  # the answer is that of then, not of now
    again = post(metadata={"name": "Zoë"})
    assert again.status_code == 202
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.content == first.content
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert count(bind, Job) == 1
    with redis.Redis(unix_socket_path=str(servers.redis_socket)) as broker:
        assert broker.llen(queue.QUEUE) == 2  # the first message may be what was lost


def test_the_same_request_in_other_words_is_the_same(post: Post, bind: Engine) -> None:
    first = post(memory_cap="4GiB")
    assert post(memory_cap=4 * 1024**3, seed=0).json() == first.json()
    assert count(bind, Job) == 1


def test_what_is_as_by_default_is_no_part_of_a_request(post: Post, bind: Engine, body: dict[str, Any]) -> None:
    """A release that adds a field must know a request again that came before it."""
    post()
    asked = json.dumps({**body, "memory_cap": 4 << 30}, sort_keys=True)
    with transaction(bind) as session:
        assert session.scalars(select(IdempotencyKey.request_sha256)).one() == sha256(asked.encode()).hexdigest()


def test_without_a_key_or_with_another_one_it_is_another_job(
    post: Post, client: TestClient, body: dict[str, Any], bind: Engine
) -> None:
    ids = {post("a").json()["id"], post("b").json()["id"], post('"a"').json()["id"], post("A").json()["id"]}
    ids |= {client.post("/jobs", json=body).json()["id"] for _ in range(2)}
    assert len(ids) == count(bind, Job) == 6
    assert count(bind, IdempotencyKey) == 4


def test_a_key_is_not_for_another_request(post: Post, bind: Engine) -> None:
    job = post()
    refused = post(steps=11)
    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert "retry-after" not in refused.headers
    assert post().json() == job.json()
    assert count(bind, Job) == 1


def test_a_key_that_is_being_worked_under_is_told_so(post: Post, bind: Engine) -> None:
    with transaction(bind) as session:
        assert database.try_lock(session, idempotency._lock_of("default", KEY))
        early = post()
        assert (early.status_code, early.json()["code"]) == (409, "idempotency_key_in_flight")
        assert early.headers["retry-after"] == "1"
        assert post("another").status_code == 202
    assert post().status_code == 202
    assert count(bind, Job) == 2


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"dataset": "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617"}, 404), ({"memory_cap": 1_000}, 422), ({"steps": 0}, 422)],
)
def test_a_refused_request_leaves_its_key_free(post: Post, bind: Engine, changes: dict[str, Any], status: int) -> None:
    assert post(**changes).status_code == status
    assert count(bind, IdempotencyKey) == 0
    made = post()
    assert made.status_code == 202
    assert "idempotency-replayed" not in made.headers


def test_a_commit_that_fails_keeps_neither_job_nor_key(post: Post, bind: Engine) -> None:
    with bind.begin() as connection:
        refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
        connection.execute(text(refuse))
        trigger = "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED"
        connection.execute(text(f"{trigger} FOR EACH ROW EXECUTE FUNCTION refuse()"))
    assert post().status_code == 500
    assert (count(bind, Job), count(bind, IdempotencyKey)) == (0, 0)
    with bind.begin() as connection:
        connection.execute(text("DROP TRIGGER late ON jobs"))
    assert post().status_code == 202
    assert (count(bind, Job), count(bind, IdempotencyKey)) == (1, 1)


def test_a_key_is_free_again_after_a_day(post: Post, bind: Engine) -> None:
    first = post().json()["id"]
    age(bind, KEY, timedelta(hours=23, minutes=59))
    assert post().json()["id"] == first
    age(bind, KEY, timedelta(minutes=1))
    second = post(steps=11)
    assert second.status_code == 202
    assert second.json()["id"] != first
    assert post(steps=11).json()["id"] == second.json()["id"]
    assert count(bind, IdempotencyKey) == 1


def test_the_sweeper_deletes_what_has_expired_little_by_little(
    post: Post, bind: Engine, settings: Settings, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours in (0, 23, 25, 26, 27):
        post(f"{hours}h")
        age(bind, f"{hours}h", timedelta(hours=hours))
    monkeypatch.setattr(idempotency, "FORGET_AT_ONCE", 2)
    left = []
    for _ in range(3):
        sweeper.sweep(bind, queue.producer(settings.redis_url), storage)
        with transaction(bind) as session:
            left.append(sorted(session.scalars(select(IdempotencyKey.key))))
    assert left == [["0h", "23h", "25h"], ["0h", "23h"], ["0h", "23h"]]
    assert count(bind, Job) == 5


@pytest.mark.parametrize("key", ["x", "!~", "k" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"'])
def test_a_key_may_be_any_visible_ascii(post: Post, key: str) -> None:
    assert post(key).status_code == 202
    assert post(key).headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("key", ["", "k" * 256, "two words", "tab\there", "Schl\u00fcssel"])
def test_a_key_that_is_none_is_refused(client: TestClient, body: dict[str, Any], bind: Engine, key: str) -> None:
    answer = client.post("/jobs", json=body, headers={b"Idempotency-Key": key.encode("latin-1")})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    (error,) = answer.json()["errors"]
    assert error == {"field": "Idempotency-Key", "message": "must be 1 to 255 visible ASCII characters"}
    assert count(bind, Job) == 0


def test_a_key_is_its_tenants(bind: Engine) -> None:
    made: list[Created] = []

    def once(tenant: str, request: dict[str, Any]) -> Created:
        def create() -> Created:
            made.append(Created(f"job_{len(made)}", "{}"))
            return made[-1]

        with transaction(bind) as session:
            return idempotency.once(session, KEY, request, create, tenant)

    with transaction(bind) as session:
        assert database.try_lock(session, idempotency._lock_of("b", KEY))
        assert once("a", {"steps": 1}) == made[0]
        with pytest.raises(IdempotencyKeyInFlightError):
            once("b", {"steps": 2})
    assert once("b", {"steps": 2}) == made[1]
    again = once("a", {"steps": 1})
    assert (again.job_id, again.replayed) == ("job_0", True)
    with pytest.raises(IdempotencyKeyReusedError):
        once("b", {"steps": 1})
    assert len(made) == 2


def test_the_document_tells_of_keys(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/jobs"]["post"]
    (header,) = operation["parameters"]
    assert (header["name"], header["in"], header["required"]) == ("Idempotency-Key", "header", False)
    assert header["schema"]["pattern"] == "^[!-~]{1,255}$"
    assert {"202", "409", "422"} <= set(operation["responses"])
    assert set(operation["responses"]["202"]["headers"]) == {"Location", "Idempotency-Replayed"}
    schema = operation["responses"]["202"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/JobResponse"}
