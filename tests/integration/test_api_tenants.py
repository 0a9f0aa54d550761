"""Every route of the OpenAPI document, asked by one tenant for what is another's: the very answer that an id gets which
never was.

With the listener of service/tenancy.py removed, the first test here is red. A route that is new has to find its ids in
`Things`, and its body, if it needs one, in `BODIES` or `NAMES_NOTHING`; else that test fails and says so.
"""

from __future__ import annotations

import itertools
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
from api.schemas import JobRequest
from service import keys, part_uploads, runs, webhooks
from service.database import transaction
from service.ids import Prefix, new_id
from service.models import Base, Tokenizer
from service.part_uploads import PartSink
from service.settings import Settings
from service.storage import Storage
from service.webhook_urls import Allowed
from tests.integration.seed import add_checkpoint, add_dataset, add_job, claim, metric

Headers = dict[str, dict[str, str]]
"""Of requests, by tenant."""
MINE, THEIRS = "acme", "other"

JOB = {"model": "performer-tiny", "memory_cap": "500MiB", "sequence_length": 128, "steps": 2}
FINE_TUNE = {"model": "performer-tiny", "memory_cap": "500MiB", "sequence_length": 128, "steps": 2}
PARAMETERS: dict[str, tuple[str, ...]] = {
    "dataset_id": ("ds",),
    "file_id": ("ds", "curve", "weights"),
    "job_id": ("job",),
    "model_id": ("model",),
    "tokenizer_id": ("tok",),
    "upload_id": ("upload",),
    "webhook_id": ("wh",),
}
"""Parameters of paths that are ids, with the kinds of things that they name."""
FIXED = {"step": "latest", "name": "model.safetensors", "artifact": "metrics.csv"}
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
    "post /v1/files": [
        (kind, {"form": {"purpose": "fine-tune", "tokenizer": "{theirs}"}}) for kind in ("tok", "model")
    ],
    "post /v1/fine_tuning/jobs": [
        ("ds", {**FINE_TUNE, "training_file": "{theirs}"}),
        ("ds", {**FINE_TUNE, "training_file": "{my_dataset}", "validation_file": "{theirs}"}),
        ("model", {**FINE_TUNE, "training_file": "{my_dataset}", "model": "{theirs}"}),
        ("tok", {**FINE_TUNE, "training_file": "{my_dataset}", "tokenizer": "{theirs}"}),
    ],
    "post /v1/uploads/{my_upload}/complete": [("part", {"part_ids": ["{theirs}"]})],
    "post /datasets/{my_dataset}/tokenizations": [
        ("tok", {"tokenizer": "{theirs}"}),
        ("model", {"tokenizer": "{theirs}"}),
    ],
}
"""Requests that name a thing in their body: its kind, and the body."""
NAMES_NOTHING = {"post /models", "post /webhooks", "post /v1/uploads"}
PATH_BODIES: dict[str, dict[str, Any]] = {
    "post /jobs/{job_id}/generate": {"json": {"prompt": "x"}},
    "post /datasets/{dataset_id}/tokenizations": {"json": {"tokenizer": "bytes"}},
    "post /v1/uploads/{upload_id}/parts": {"files": {"data": ("part", b"some text")}},
    "post /v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["{part}"]}},
}
"""What a request needs beside the id in its path."""
NOT_FOR_THE_OWNER = {"post /jobs/{job_id}/generate"}
"""It would start a process."""


@dataclass(frozen=True, slots=True)
class Things:
    """Ids by kind."""

    ids: dict[str, str]

    def paths(self, template: str) -> list[str]:
        """The path for each kind of thing that it may be about. Fails for a parameter that is not known here."""
        names = [match.partition(":")[0] for match in re.findall(r"\{([^}]*)\}", template)]
        for name in names:
            if name not in PARAMETERS and name not in FIXED:
                pytest.fail(f"{template}: say in PARAMETERS or FIXED what {name} is")
        kinds = [PARAMETERS.get(name, (name,)) for name in names]
        return [self._filled(template, dict(zip(names, chosen, strict=True))) for chosen in itertools.product(*kinds)]

    def _filled(self, template: str, kinds: dict[str, str]) -> str:
        for name, kind in kinds.items():
            template = re.sub(rf"\{{{name}(:[^}}]*)?\}}", FIXED.get(kind) or self.ids[kind], template)
        return template

    def body(self, name: str) -> dict[str, Any]:
        """What the request needs beside its path."""
        body = PATH_BODIES.get(name, {})
        if "json" not in body:
            return body
        return {"json": json.loads(json.dumps(body["json"]).replace("{part}", self.ids["part"]))}


@pytest.fixture
def theirs(bind: Engine, storage: Storage) -> Things:
    dataset = add_dataset(bind, storage, tenant=THEIRS).id
    spec = JobRequest.model_validate({**JOB, "dataset": dataset}).model_dump(mode="json", exclude={"dataset"})
    claimed = claim(bind, add_job(bind, dataset, tenant=THEIRS, **{**spec, "steps": 10}).id)
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
    upload, part = add_upload(bind, storage, THEIRS)
    ids = {"ds": dataset, "job": claimed.id, "model": model, "tok": tokenizer.id, "wh": webhook.id, "upload": upload}
    return Things({**ids, "part": part, **results_of(claimed.id)})


def add_upload(bind: Engine, storage: Storage, tenant: str) -> tuple[str, str]:
    """Ids of an upload in parts and of its part."""
    with transaction(bind, tenant) as session:
        upload = part_uploads.create(session, "a.txt", 9, 1_000)
    with PartSink(bind, storage, upload.id, tenant) as sink:
        sink.write(b"some text")
        return upload.id, sink.store().id


def results_of(job_id: str) -> dict[str, str]:
    """Ids of what a job leaves: its curve, and a file of its checkpoint of step 1."""
    prefix = "result_" + job_id.removeprefix("job_")
    return {"curve": f"{prefix}_metrics", "weights": f"{prefix}_1_1"}


@pytest.fixture
def nobodys() -> Things:
    kinds: tuple[Prefix, ...] = ("ds", "job", "model", "part", "tok", "upload", "wh")
    ids = {str(kind): new_id(kind) for kind in kinds}
    return Things(ids | results_of(ids["job"]))


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
    my_upload, _ = add_upload(bind, storage, MINE)
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
            bodies = theirs.body(name), nobodys.body(name)
            for urls in zip(theirs.paths(path), nobodys.paths(path), strict=True):
                for media_type in media_types:
                    same(name, method, urls, {"Accept": media_type}, values=bodies)
                if method == "get":
                    same(f"head {path}", "head", urls, {}, values=({}, {}))
        elif method == "get":
            listed = api.get(path, headers=mine)
            assert listed.status_code == 200, name
            assert not [identifier for identifier in theirs.ids.values() if identifier in listed.text], name
        elif name not in BODIES and name not in NAMES_NOTHING:
            pytest.fail(f"{name}: say in BODIES what it can name, or that it names nothing")
    for name, named in BODIES.items():
        method, _, path = name.partition(" ")
        url = path.format(my_dataset=my_dataset, my_upload=my_upload)
        for kind, body in named:
            values = tuple(_sent(body, things.ids[kind], my_dataset) for things in (theirs, nobodys))
            same(f"{name} {body}", method, (url, url), {}, values=values)
    assert tried >= 80
    assert rows(bind) == before


def test_the_owner_finds_all_of_it(api: TestClient, theirs: Things, as_tenant: Headers) -> None:
    """Else the test above would be content with an API where nothing is found."""
    found, gone = [], set()
    for method, path, _ in sorted(operations(api), key=_deletions_last):
        name = f"{method} {path}"
        for url in theirs.paths(path) if "{" in path and name not in NOT_FOR_THE_OWNER else ():
            if (method, url.rpartition("/")[2]) in gone:
                continue  # two routes delete the same thing
            found.append((name, api.request(method, url, headers=as_tenant[THEIRS], **theirs.body(name)).status_code))
            gone.add(("delete", url.rpartition("/")[2]) if method == "delete" else ("", ""))
    assert not [entry for entry in found if entry[1] == 404 or entry[1] >= 500]
    assert len(found) > 30


def _deletions_last(operation: tuple[str, str, list[str]]) -> tuple[bool, bool, bool]:
    """Of models last but one: the checkpoint that an output is has files of its own. Of jobs last of all."""
    method, path, _ = operation
    return method == "delete", path == "/jobs/{job_id}", "models" in path


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
