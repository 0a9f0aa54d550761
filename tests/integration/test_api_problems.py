"""Hostile requests, faults of ours, and what the API says of itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from api import readiness
from api.app import create_app
from api.errors import service_problem
from api.problem_examples import ERRORS
from service import calibrations
from service.database import transaction
from service.errors import DatasetInUseError, ModelInvalidError, TokenizerFailedError, TokenizerInvalidError
from service.settings import Settings

JSON = {"content-type": "application/json"}


def check_problem(answer: Any) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 8_192
    assert problem["status"] == answer.status_code
    assert problem["type"] == f"urn:slimtune:problem:{problem['code']}"
    assert problem["title"]
    assert problem["error"]["code"] == problem["code"]
    assert problem["error"]["message"] == problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


HOSTILE = {
    "nothing": b"",
    "no JSON": b"hello",
    "cut": b'{"model": ',
    "null": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "NaN": b'{"gradient_clip": NaN}',
    "Infinity": b'{"gradient_clip": -Infinity}',
    "overflow": b'{"gradient_clip": 1e999}',
    "long int": b'{"seed": ' + b"9" * 5_000 + b"}",
    "int64": b'{"seed": 9223372036854775808}',
    "huge float as int": b'{"optimizer": {"learning_rate": ' + b"9" * 400 + b"}}",
    "NUL": b'{"name": "a\\u0000b"}',
    "surrogate": b'{"name": "\\ud800"}',
    "surrogate key": b'{"\\udfff": 1}',
    "surrogate metadata": b'{"metadata": {"\\ud800": "\\ud800"}}',
    "not UTF-8": b'{"name": "\xff"}',
    "UTF-16": '{"name": "x"}'.encode("utf-16"),
    "deep list": b"[" * 10_000,
    "deep object": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "closed deep list": b'{"metadata": ' + b"[" * 400 + b"]" * 400 + b"}",
    "long text": b'{"model": "' + b"x" * 900_000 + b'"}',
    "long key": b'{"' + b"k" * 900_000 + b'": 1}',
    "many keys": json.dumps(dict.fromkeys(map(str, range(20_000)))).encode(),
    "wrong types": b'{"optimizer": [], "schedule": 1, "metadata": "x", "chunking": [1], "early_stopping": true}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_a_short_4xx(shared_client: TestClient, name: str) -> None:
    for path in ("/jobs", "/plans"):
        answer = shared_client.post(path, content=HOSTILE[name], headers=JSON)
        assert answer.status_code in {400, 422}
        problem = check_problem(answer)
        for error in problem.get("errors", []):
            assert len(error["field"]) <= 200
            assert len(error["message"]) <= 200


def test_json_is_utf_8(shared_client: TestClient) -> None:
    body = json.dumps({"model": "performer-tiny", "memory_cap": "4GiB", "sequence_length": 64, "steps": 1})
    assert shared_client.post("/plans", content=body.encode(), headers=JSON).status_code == 200
    for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        answer = shared_client.post("/plans", content=body.encode(codec), headers=JSON)
        assert (answer.status_code, check_problem(answer)["code"]) == (400, "malformed_body")


def test_the_name_of_an_unknown_field_is_not_repeated_whole(shared_client: TestClient) -> None:
    body = {"model": "performer-tiny", "memory_cap": "4GiB", "sequence_length": 64, "steps": 1, "k" * 100_000: 1}
    problem = check_problem(shared_client.post("/plans", json=body))
    assert len(problem["error"]["param"]) <= 200


def test_an_error_is_short_whatever_it_is_about() -> None:
    long = "\U0001f600" * 100_000
    many = [f"job_{number:032}" for number in range(1_000)]
    for error in (
        ModelInvalidError([{"file": long, "reason": long}] * 1_000),
        TokenizerInvalidError(long),
        TokenizerFailedError("tok_1", {"code": "a", "message": long, "hint": "b", "problems": [long] * 100}),
        DatasetInUseError("ds_1", many, many),
    ):
        answer = service_problem({"type": "http", "path": "/jobs"}, error)
        assert len(answer.body) < 8_192
        assert json.loads(bytes(answer.body))["detail"].count("\U0001f600") <= 200
    assert json.loads(bytes(answer.body))["jobs"] == many[: len(json.loads(bytes(answer.body))["jobs"])]


def test_no_text_of_ours_is_cut() -> None:
    assert [
        error.code
        for error in ERRORS
        if '..."' in bytes(service_problem({"path": "/jobs"}, error, log=False).body).decode()
    ] == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("name", "model", "dataset", "memory_cap", "sequence_length", "steps", "epochs", "optimizer", "metadata")


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), json_values, max_size=6))
@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_object_breaks_the_api(shared_client: TestClient, body: dict[str, Any]) -> None:
    base = {"model": "performer-tiny", "memory_cap": "4GiB", "sequence_length": 64, "steps": 1}
    for path in ("/jobs", "/plans"):
        answer = shared_client.post(path, content=json.dumps({**base, **body}), headers=JSON)
        if answer.status_code != 200:
            assert answer.status_code in {400, 404, 422}
            check_problem(answer)


def test_a_body_over_a_megabyte_is_refused(shared_client: TestClient) -> None:
    answer = shared_client.post("/jobs", content=b" " * 1_000_001, headers=JSON)
    assert answer.status_code == 413
    assert check_problem(answer)["code"] == "body_too_large"

    def unannounced() -> Any:
        yield from [b" " * 100_000] * 11

    answer = shared_client.post("/jobs", content=unannounced(), headers=JSON)
    assert "content-length" not in answer.request.headers
    assert check_problem(answer)["code"] == "body_too_large"
    answer = shared_client.post("/plans", content=b"x" * 2_000_000, headers={"content-type": "multipart/form-data"})
    assert check_problem(answer)["code"] == "body_too_large"
    assert shared_client.post("/jobs", content=b" " * 1_000_000, headers=JSON).status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/jobs/", 404, "not_found"),
        ("GET", "/%00", 404, "not_found"),
        ("DELETE", "/jobs", 405, "method_not_allowed"),
        ("PUT", "/datasets", 405, "method_not_allowed"),
    ],
)
def test_a_path_or_method_that_is_not_there(
    shared_client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    answer = shared_client.request(method, path)
    assert (answer.status_code, check_problem(answer)["code"]) == (status, code)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_fault_of_ours_shows_nothing_of_the_inside(client: TestClient, bind: Engine) -> None:
    with bind.begin() as connection:
        connection.execute(text("ALTER TABLE jobs RENAME COLUMN worker TO secret_column"))
    answer = client.get("/jobs")
    assert answer.status_code == 500
    assert check_problem(answer)["code"] == "internal_error"
    assert "worker" not in answer.text
    assert "SELECT" not in answer.text


def test_without_the_database_the_answer_is_a_503(settings: Settings) -> None:
    away = settings.model_copy(update={"database_url": "postgresql://127.0.0.1:1/none"})
    with TestClient(create_app(away), base_url="http://127.0.0.1") as client:
        answer = client.get("/jobs")
        assert answer.status_code == 503
        assert check_problem(answer)["code"] == "database_unavailable"
        assert answer.headers["retry-after"]
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").json()["checks"] == {"database": False, "broker": True, "worker": False}


def test_every_request_has_its_own_id(shared_client: TestClient) -> None:
    ids = {shared_client.get("/healthz", headers={"x-request-id": "mine"}).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(request_id.startswith("req_") for request_id in ids)


def test_ready_means_that_a_job_can_run(
    client: TestClient, bind: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a second ago: whoever has no key can ask for it as often as they like."""
    now = [1_000.0]
    monkeypatch.setattr(readiness, "monotonic", lambda: now[0])
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]) == (503, {"database": True, "broker": True, "worker": False})
    with transaction(bind) as session:
        calibrations.store(session, "cpu", "worker-1", {"threads": 2})
    now[0] += readiness.REMEMBER_SECONDS
    assert client.get("/readyz").status_code == 503
    now[0] += 0.001
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    away = settings.model_copy(update={"redis_url": "redis+socket:///nowhere/redis.sock"})
    with TestClient(create_app(away), base_url="http://127.0.0.1") as other:
        assert other.get("/readyz").json()["checks"] == {"database": True, "broker": False, "worker": True}


def test_an_empty_database_is_not_ready(empty_database_url: str, settings: Settings) -> None:
    unmigrated = settings.model_copy(update={"database_url": empty_database_url})
    with TestClient(create_app(unmigrated), base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").json()["checks"] == {"database": False, "broker": True, "worker": False}


def test_an_unreadable_calibration_does_not_stop_planning(client: TestClient, bind: Engine) -> None:
    with transaction(bind) as session:
        calibrations.store(session, "cpu", "of another version", {"speed": 2})
    body = {"model": "performer-tiny", "memory_cap": "4GiB", "sequence_length": 64, "steps": 1}
    assert client.post("/plans", json=body).json()["calibration_source"] == "default"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    # The document needs no server: nothing connects before the first request.
    settings = Settings(database_url="postgresql://", redis_url="redis://", data_dir="/nowhere")
    app: FastAPI = create_app(settings)
    return app.openapi()


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references = set(json.dumps(document).split('"$ref": "#/components/schemas/')[1:])
    assert references
    assert {reference.split('"')[0] for reference in references} <= set(schemas)
    assert "HTTPValidationError" not in schemas
