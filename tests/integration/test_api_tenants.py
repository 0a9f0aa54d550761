"""Every route of the OpenAPI document, asked by one tenant for what is another's: the very answer that an id gets which
never was.

With the listener of service/tenancy.py removed, the first test here is red. A route that is new has to find its ids in
`Things`, and its body, if it needs one, in `BODIES` or `NAMES_NOTHING`; else that test fails and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import sqlalchemy
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.access import OPEN_PATHS
from api.app import create_app
from service import keys, runs, webhooks
from service.database import transaction
from service.ids import Prefix, new_id
from service.models import Base, Tokenizer
from service.settings import Settings
from service.storage import Storage
from service.webhook_urls import Allowed
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim, metric

Headers = dict[str, dict[str, str]]
"""Of requests, by tenant."""
MINE, THEIRS = "acme", "other"

JOB = {"model": "performer-tiny", "memory_cap": "500MiB", "sequence_length": 128, "steps": 2}
PARAMETERS: dict[str, str] = {
    "dataset_id": "ds",
    "job_id": "job",
    "model_id": "model",
    "tokenizer_id": "tok",
    "webhook_id": "wh",
}
"""Parameters of paths that are ids, with the kind of thing that they name."""
FIXED = {"step": "latest", "name": "model.safetensors"}
"""Parameters below an id."""
BODIES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "post /jobs": [
        ("ds", {**JOB, "dataset": "{theirs}"}),
        ("ds", {**JOB, "dataset": "{my_dataset}", "validation_dataset": "{theirs}", "evaluate_every": 1}),
        ("model", {**JOB, "dataset": "{my_dataset}", "model": "{theirs}"}),
        ("tok", {**JOB, "dataset": "{my_dataset}", "tokenizer": "{theirs}"}),
    ],
    "post /plans": [
        ("ds", {**JOB, "dataset": "{theirs}"}),
        ("ds", {**JOB, "validation_dataset": "{theirs}", "evaluate_every": 1}),
        ("model", {**JOB, "model": "{theirs}"}),
        ("tok", {**JOB, "tokenizer": "{theirs}"}),
    ],
    "post /tokenizers": [("ds", {"train": {"dataset": "{theirs}", "vocab_size": 512}})],
    "post /datasets": [("tok", {"form": {"tokenizer": "{theirs}"}}), ("model", {"form": {"tokenizer": "{theirs}"}})],
    "post /datasets/{my_dataset}/tokenizations": [
        ("tok", {"tokenizer": "{theirs}"}),
        ("model", {"tokenizer": "{theirs}"}),
    ],
}
"""Requests that name a thing in their body: its kind, and the body."""
NAMES_NOTHING = {"post /models", "post /webhooks"}
PATH_BODIES: dict[str, Any] = {
    "post /jobs/{job_id}/generate": {"prompt": "x"},
    "post /datasets/{dataset_id}/tokenizations": {"tokenizer": "bytes"},
}
"""What a request needs beside the id in its path."""
NOT_FOR_THE_OWNER = {"post /jobs/{job_id}/generate"}
"""It would start a process."""


@dataclass(frozen=True, slots=True)
class Things:
    """Ids by kind."""

    ids: dict[str, str]

    def path(self, template: str) -> str:
        """Fails for a parameter that is not known here."""

        def value(match: re.Match[str]) -> str:
            name = match[1].partition(":")[0]
            if name in PARAMETERS:
                return self.ids[PARAMETERS[name]]
            return FIXED.get(name) or pytest.fail(f"{template}: say in PARAMETERS or FIXED what {name} is")

        return re.sub(r"\{([^}]*)\}", value, template)


@pytest.fixture
def theirs(bind: Engine, storage: Storage) -> Things:
    dataset = add_dataset(bind, storage, tenant=THEIRS).id
    claimed = claim(bind, add_job(bind, dataset, tenant=THEIRS).id)
    with transaction(bind) as session:
        runs.record_metrics(session, claimed.id, claimed.attempt, [metric(1)])
        add_checkpoint(session, storage, claimed, 1)
        model = runs.finish(session, claimed.id, claimed.attempt, "succeeded").output_model_id
        assert model is not None
        tokenizer = Tokenizer(id=new_id("tok"), tenant=THEIRS, name="t", source="upload", status="ready", path="t")
        tokenizer.key, tokenizer.vocab_size = "k", 300
        session.add(tokenizer)
    with transaction(bind, THEIRS) as session:
        address = "https://hooks.example.com/"
        webhook = webhooks.create(session, Allowed.parse(address), url=address)
    return Things({"ds": dataset, "job": claimed.id, "model": model, "tok": tokenizer.id, "wh": webhook.id})


@pytest.fixture
def nobodys() -> Things:
    kinds: tuple[Prefix, ...] = ("ds", "job", "model", "tok", "wh")
    return Things({kind: new_id(kind) for kind in kinds})


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as running:
        yield running


@pytest.fixture
def as_tenant(bind: Engine) -> Headers:
    """The headers that each of them sends."""
    with transaction(bind) as session:
        made = {tenant: keys.create(session, tenant, "a key")[1] for tenant in (MINE, THEIRS)}
    return {tenant: {"Authorization": f"Bearer {key}"} for tenant, key in made.items()}


def operations(api: TestClient) -> list[tuple[str, str, list[str]]]:
    """Method, path, and what its answers can be in."""
    document: dict[str, Any] = api.get("/openapi.json").json()
    return [
        (method, path, list(operation["responses"].get("200", {}).get("content", {})) or ["*/*"])
        for path, methods in document["paths"].items()
        if path not in OPEN_PATHS
        for method, operation in methods.items()
    ]


def rows(bind: Engine) -> dict[str, list[Any]]:
    """All that is in the database but the keys, of which the use is noted."""
    with bind.connect() as connection:
        return {
            name: sorted(map(str, connection.execute(sqlalchemy.select(table)).all()))
            for name, table in Base.metadata.tables.items()
            if name != "api_keys"
        }


def shown(answer: httpx2.Response, things: Things) -> tuple[int, str]:
    """Status and body, but for the request's id and the ids that were asked for."""
    text = re.sub(r"req_[0-9a-f]{32}", "REQUEST", answer.text)
    for kind, identifier in things.ids.items():
        text = text.replace(identifier, kind.upper())
    return answer.status_code, text


def test_what_is_anothers_was_never_there(
    api: TestClient,
    bind: Engine,
    storage: Storage,
    theirs: Things,
    nobodys: Things,
    as_tenant: Headers,
) -> None:
    my_dataset = add_dataset(bind, storage, tenant=MINE).id
    before = rows(bind)
    mine = as_tenant[MINE]
    tried = 0

    def same(name: str, method: str, things: tuple[str, str], headers: dict[str, str], **request: Any) -> None:
        nonlocal tried
        tried += 1
        of_theirs, of_nobody = (
            shown(api.request(method, url, headers=mine | headers, **values), ids)
            for url, values, ids in zip(things, request["values"], (theirs, nobodys), strict=True)
        )
        assert of_theirs == of_nobody, name
        assert of_theirs[0] == 404 or (method == "head" and of_theirs[0] == 405), (name, of_theirs)

    for method, path, media_types in operations(api):
        name = f"{method} {path}"
        if "{" in path:
            body = {"json": PATH_BODIES[name]} if name in PATH_BODIES else {}
            urls = theirs.path(path), nobodys.path(path)
            for media_type in media_types:
                same(name, method, urls, {"Accept": media_type}, values=(body, body))
            if method == "get":
                same(f"head {path}", "head", urls, {}, values=({}, {}))
        elif method == "get":
            listed = api.get(path, headers=mine)
            assert listed.status_code == 200, name
            assert not [identifier for identifier in theirs.ids.values() if identifier in listed.text], name
        elif name not in BODIES and name not in NAMES_NOTHING:
            pytest.fail(f"{name}: say in BODIES what it can name, or that it names nothing")
    for name, bodies in BODIES.items():
        method, _, path = name.partition(" ")
        url = path.format(my_dataset=my_dataset)
        for kind, body in bodies:
            values = tuple(_sent(body, things.ids[kind], my_dataset) for things in (theirs, nobodys))
            same(f"{name} {body}", method, (url, url), {}, values=values)
    assert tried >= 35
    assert rows(bind) == before


def test_the_owner_finds_all_of_it(api: TestClient, theirs: Things, as_tenant: Headers) -> None:
    """Else the test above would be content with an API where nothing is found."""
    found = [
        (f"{method} {path}", api.request(method, theirs.path(path), headers=as_tenant[THEIRS], json=body).status_code)
        for method, path, _ in sorted(operations(api), key=lambda operation: operation[0] == "delete")
        if "{" in path and f"{method} {path}" not in NOT_FOR_THE_OWNER
        for body in [PATH_BODIES.get(f"{method} {path}")]
    ]
    assert not [entry for entry in found if entry[1] == 404]
    assert len(found) > 15


def test_an_idempotency_key_is_its_tenants(api: TestClient, bind: Engine, storage: Storage, as_tenant: Headers) -> None:
    made = []
    for tenant, headers in as_tenant.items():
        body = {**JOB, "dataset": add_dataset(bind, storage, tenant=tenant).id}
        for _ in range(2):
            answer = api.post("/jobs", json=body, headers={**headers, "Idempotency-Key": "same-key"})
            made.append((answer.status_code, answer.json()["id"], answer.headers.get("idempotency-replayed")))
    assert [status for status, _, _ in made] == [202] * 4
    assert [replayed for _, _, replayed in made] == [None, "true"] * 2
    assert len({identifier for _, identifier, _ in made}) == 2


def _sent(body: dict[str, Any], theirs: str, my_dataset: str) -> dict[str, Any]:
    """The arguments of a request with this body, or of one with these fields in a form."""
    text = json.dumps(body).replace("{theirs}", theirs).replace("{my_dataset}", my_dataset)
    filled: dict[str, Any] = json.loads(text)
    if "form" in filled:
        return {"data": filled["form"], "files": {"file": ("a.txt", b"some text")}}
    return {"json": filled}
