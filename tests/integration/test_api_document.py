"""The document of the API: whole for every route, also for one that is added, and its examples true."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator
from sqlalchemy import update
from starlette.testclient import TestClient

from api import errors as api_errors
from api import sampler
from api.app import create_app
from api.openai.requests import COMPLETE_EXAMPLES
from api.openapi import document as document_of
from api.problem_examples import ERRORS
from api.problems import MEDIA_TYPE
from service import errors, models
from service.database import engine, transaction
from service.errors import ServiceError
from service.settings import Settings
from service.storage import Storage
from tests.integration.model_files import llama
from tests.integration.seed import add_checkpoint, claim

Operation = dict[str, Any]
SETTINGS = Settings(database_url="postgresql://", redis_url="redis://", data_dir="/nowhere")  # it connects to nothing
DOCUMENT: dict[str, Any] = create_app(SETTINGS).openapi()
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
}
INTERNAL = {"FencedError", "PreparationFencedError", "ServiceError"}
"""Errors that no client meets."""


def problems_of(operation: Operation) -> Iterator[str]:
    """What is missing in the description of a route."""
    if not operation.get("summary"):
        yield "no summary"
    responses = operation["responses"]
    for status in ("431", "500"):
        if status not in responses:
            yield f"no {status}"
    for status, response in responses.items():
        content = response.get("content", {})
        if status >= "400" and status != "503" and list(content) != [MEDIA_TYPE]:
            yield f"{status} is not a problem"
        if MEDIA_TYPE in content and not content[MEDIA_TYPE].get("examples"):
            yield f"{status} has no example"
        if status < "300" and "application/json" in content and "example" not in content["application/json"]:
            yield f"{status} has no example"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        if kind == "application/json" and "examples" not in content:
            yield "the body has no example"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_route_is_described_whole(name: str) -> None:
    assert list(problems_of(OPERATIONS[name])) == []
    if "{" in name:
        assert "not_found" not in OPERATIONS[name]["responses"]["404"]["content"][MEDIA_TYPE]["examples"]


def test_every_route_has_an_operation_id_of_its_own() -> None:
    assert len({operation["operationId"] for operation in OPERATIONS.values()}) == len(OPERATIONS)


def test_a_route_that_says_nothing_is_found() -> None:
    app = create_app(SETTINGS)

    def silent(body: dict[str, int]) -> Any:
        return body

    app.post("/silent", response_model=dict[str, int], summary="")(silent)
    app.openapi_schema = None
    found = list(problems_of(document_of(app, keys_required=False)["paths"]["/silent"]["post"]))
    assert found == ["200 has no example", "the body has no example"]


def resolved(node: Any) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        target: Any = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def response_examples() -> Iterator[tuple[str, dict[str, Any], Any]]:
    for name, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            for kind, content in response.get("content", {}).items():
                if "example" in content:
                    yield f"{name} {status} {kind}", content["schema"], content["example"]
                for code, example in content.get("examples", {}).items():
                    yield f"{name} {status} {code}", content["schema"], resolved(example)["value"]


def test_every_example_of_an_answer_fits_its_schema() -> None:
    seen = 0
    for name, schema, value in response_examples():
        assert [error.message for error in validator(schema).iter_errors(value)] == [], name
        seen += 1
    assert seen > 100


def test_every_example_of_a_problem_has_the_status_and_the_code_that_it_stands_for() -> None:
    for name, operation in OPERATIONS.items():
        for status, response in operation["responses"].items():
            for code, example in response.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {}).items():
                body = resolved(example)["value"]
                assert (str(body["status"]), body["code"]) == (status, code), name


def test_every_error_has_an_example_and_a_route() -> None:
    classes = {
        item
        for module in (errors, api_errors)
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, ServiceError) and item.__name__ not in INTERNAL
    }
    assert classes == {type(error) for error in ERRORS}
    listed = {
        code
        for operation in OPERATIONS.values()
        for response in operation["responses"].values()
        for code in response.get("content", {}).get(MEDIA_TYPE, {}).get("examples", {})
    }
    assert {error.code for error in ERRORS} <= listed


def request_examples() -> list[tuple[str, str, Any]]:
    return [
        (name, label, example["value"])
        for name, operation in OPERATIONS.items()
        for label, example in operation.get("requestBody", {})
        .get("content", {})
        .get("application/json", {})
        .get("examples", {})
        .items()
    ]


@pytest.fixture(scope="module")
def shared_settings(shared_settings: Settings) -> Settings:
    return shared_settings.model_copy(update={"webhook_allowed": "https://hooks.example.com/"})


def add_upload(client: TestClient) -> dict[str, str]:
    """An upload of the text whose MD5 the example has, with its two parts."""
    portions = (b"The quick brown fox ", b"jumps over the lazy dog")
    announced = {"filename": "fox.txt", "bytes": sum(map(len, portions)), "purpose": "fine-tune"}
    upload = client.post("/v1/uploads", json=announced).json()["id"]
    parts = [client.post(f"/v1/uploads/{upload}/parts", files={"data": ("part", portion)}) for portion in portions]
    named = COMPLETE_EXAMPLES["two parts"]["value"]["part_ids"]
    return {"upload_": upload, **dict(zip(named, (part.json()["id"] for part in parts), strict=True))}


@pytest.fixture(scope="module")
def ids(shared_client: TestClient, shared_settings: Settings) -> Iterator[dict[str, str]]:
    """Real ids, by what the examples' ids begin with. The job is paused and has a checkpoint."""
    bind, storage = engine(shared_settings), Storage(shared_settings.data_dir)
    dataset = shared_client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 10_000)}).json()["id"]
    wanted = {"train": {"dataset": dataset, "vocab_size": 300}}
    tokenizer = shared_client.post("/tokenizers", json=wanted).json()["id"]
    model = shared_client.post("/models", files=[("file", item) for item in llama().items()]).json()["id"]
    body = {"model": "performer-tiny", "dataset": dataset, "memory_cap": "2GiB", "sequence_length": 128, "steps": 10}
    job = shared_client.post("/jobs", json=body).json()["id"]
    claimed = claim(bind, job)
    with transaction(bind) as session:
        add_checkpoint(session, storage, claimed, 3)
        session.execute(update(models.Tokenizer).values(status="ready", vocab_size=300, key="a" * 64))
    yield {"ds_": dataset, "tok_": tokenizer, "job_": job, "model_": model} | add_upload(shared_client)
    bind.dispose()


PARAMETERS = {"dataset_id": "ds_", "tokenizer_id": "tok_", "job_id": "job_", "upload_id": "upload_"}


def pause(settings: Settings, job_id: str) -> None:
    bind = engine(settings)
    state = {"status": "paused", "desired": "pause", "worker": None, "lease_until": None}
    with transaction(bind) as session:
        session.execute(update(models.Job).where(models.Job.id == job_id).values(state))
    bind.dispose()


def with_real_ids(value: Any, ids: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: with_real_ids(item, ids) for name, item in value.items()}
    if isinstance(value, list):
        return [with_real_ids(item, ids) for item in value]
    found = [real for prefix, real in ids.items() if isinstance(value, str) and value.startswith(prefix)]
    return found[0] if found else value


@pytest.mark.parametrize(("name", "label", "value"), request_examples())
def test_every_example_of_a_request_is_accepted(
    shared_client: TestClient,
    shared_settings: Settings,
    ids: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    label: str,
    value: Any,
) -> None:
    monkeypatch.setattr(sampler, "is_available", lambda: False)
    method, path = name.split()
    for parameter, prefix in PARAMETERS.items():
        path = path.replace(f"{{{parameter}}}", ids[prefix])
    if path.endswith("/resume"):
        pause(shared_settings, ids["job_"])
    answer = shared_client.request(method, path, json=with_real_ids(value, ids))
    if path.endswith("/generate"):  # what it samples, its own tests show
        assert (answer.status_code, answer.json()["code"]) == (501, "generate_unavailable")
    else:
        assert answer.is_success, f"{name} {label}: {answer.text}"


def test_the_reference_for_people_has_everything_and_loads_nothing(shared_client: TestClient) -> None:
    answer = shared_client.get("/docs")
    html = answer.text
    assert answer.status_code == 200
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(ids) >= {operation["operationId"].strip("_") for operation in OPERATIONS.values()}
    assert set(ids) >= set(DOCUMENT["components"]["examples"])
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    for name in DOCUMENT["components"]["schemas"]["JobRequest"]["properties"]:
        assert f"<td><code>{name}</code>" in html
    for name in ("beta2", "targets", "warmup_steps", "minimum_cap_bytes"):  # of objects in objects
        assert f"<code>{name}</code>" in html
    assert not re.search(r"<script|<link|<img|\bsrc=|url\(|@import", html)
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    again = shared_client.get("/docs", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert shared_client.get("/redoc").status_code == 404
