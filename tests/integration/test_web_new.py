"""The pages of new jobs, comparisons and data: what they show to whom, and that the form has what the API takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from api.schemas import JobRequest
from api.web import job_form
from service import keys
from service.database import transaction
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_dataset

PAGES = ("/ui/new", "/ui/compare", "/ui/data")
HOSTILE = "<script>alert(1)</script>' \" }}{{ 7*7 }}"
FULL_SPEC: dict[str, Any] = {
    "name": HOSTILE,
    "model": "performer-tiny",
    "memory_cap": "600MiB",
    "sequence_length": 128,
    "batch_size": 2,
    "epochs": 2,
    "method": {"type": "lora", "rank": 4, "alpha": 8, "targets": ["query", "mlp_in"]},
    "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.25},
    "schedule": {"name": "constant", "warmup_steps": 3},
    "gradient_clip": None,
    "evaluate_every": 1,
    "validation_fraction": 0.25,
    "early_stopping": {"patience": 7},
    "chunking": {"chunk_length": 64, "state_policy": "reverse"},
    "metadata": {"team": HOSTILE},
    "seed": 11,
}


class Controls(HTMLParser):
    """The form as a browser has it: for each path what its control says."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.said: dict[str, Any] = {}
        self._select = self._boxes = self._text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        path = found.get("data-path")
        if tag == "option" and "selected" in found:
            self.said[self._select] = found["value"]
        elif tag == "input" and path is None and self._boxes and "checked" in found:
            self.said[self._boxes].append(found["value"])
        if path is None:
            return
        self._select, self._text = (path if tag == kind else "" for kind in ("select", "textarea"))
        self._boxes = path if tag == "fieldset" else ""
        if found.get("type") == "radio":
            if "checked" in found:
                self.said[path] = found["value"]
        elif found.get("type") == "checkbox":
            self.said[path] = "checked" in found
        else:
            self.said[path] = [] if tag == "fieldset" else found.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("textarea", "fieldset"):
            self._text = self._boxes = ""

    def handle_data(self, data: str) -> None:
        if self._text:
            self.said[self._text] += data


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"authentication": "keys"}))
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as running:
        yield running


def test_the_form_has_every_field_of_a_job() -> None:
    wanted = set(_leaves(JobRequest, ""))
    assert {"optimizer.momentum", "method.targets", "chunking.chunk_length", "steps"} <= wanted
    form = set(job_form.fields())
    assert wanted - form == set()
    grouped = [each.path for group in job_form.groups(job_form.fields()) for each in group.fields]
    assert sorted([*job_form.COMMON, *grouped]) == sorted(form), "each is shown once"


def test_pages_of_a_fresh_service(client: TestClient) -> None:
    for path in PAGES:
        answer = client.get(path)
        assert answer.status_code == 200
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", answer.text), "nothing of its own"
    said = Controls(client.get("/ui/new").text).said
    assert said.keys() >= job_form.fields().keys()
    assert (said["optimizer.learning_rate"], said["keep"], said["chunking"]) == ("0.001", "2", "auto")
    assert said["dataset"] == ""
    assert "No data yet" in client.get("/ui/data").text
    assert "There are not two jobs yet" in client.get("/ui/compare").text


def test_a_job_again_with_everything_it_had(client: TestClient, bind: Engine, storage: Storage) -> None:
    dataset = client.post(
        "/datasets", files={"file": ("a.jsonl", '{"text": "Hello, world."}\n' * 200)}, data={"name": HOSTILE}
    ).json()["id"]
    first = client.post("/jobs", json={**FULL_SPEC, "dataset": dataset})
    assert first.status_code == 202, first.text
    job_id = first.json()["id"]
    page = client.get(f"/ui/new?from={job_id}").text
    assert "<script>alert" not in page
    said = Controls(page).said
    assert {path: said[path] for path in ("name", "model", "dataset", "memory_cap", "batch_size", "seed")} == {
        "name": HOSTILE, "model": "performer-tiny", "dataset": dataset, "memory_cap": "600 MiB", "batch_size": "2",
        "seed": "11",
    }  # fmt: skip
    assert (said["@duration"], said["epochs"], said["steps"]) == ("epochs", "2", "")
    assert (said["@validation"], said["validation_fraction"]) == ("fraction", "0.25")
    assert (said["method.type"], said["method.rank"], said["method.targets"]) == ("lora", "4", ["query", "mlp_in"])
    assert (said["optimizer.name"], said["optimizer.momentum"], said["gradient_clip"]) == ("sgd", "0.25", "")
    assert (said["early_stopping"], said["early_stopping.patience"]) == (True, "7")
    assert (said["chunking"], said["chunking.chunk_length"]) == (job_form.OWN, "64")
    assert said["metadata"].strip() == f"team={HOSTILE}"

    second = client.post("/jobs", json={**FULL_SPEC, "dataset": dataset, "memory_cap": "700MiB"}).json()["id"]
    page = client.get(f"/ui/compare?job={job_id}&job={second}").text
    assert "<script>alert" not in page
    differing = re.findall(r'<tr class="differs"><th scope="row">([^<]+)<', page)
    assert "Memory cap" in differing
    assert not {"Seed", "Learning rate", "LoRA rank"} & set(differing)
    assert json.loads(re.search(r"data-jobs='([^']+)'", page)[1]) == [job_id, second]  # type: ignore[index]
    page = client.get("/ui/data").text
    assert "<script>alert" not in page
    assert f'data-delete="/datasets/{dataset}"' in page
    assert "<html" not in client.get("/ui/data/lists").text


def test_others_jobs_and_data_are_not_there(guarded: TestClient, bind: Engine, storage: Storage) -> None:
    with transaction(bind) as session:
        made = {tenant: keys.create(session, tenant, "a key")[1] for tenant in ("acme", "other")}
    theirs = add_dataset(bind, storage, tenant="other").id
    body = {"model": "performer-tiny", "memory_cap": "1GiB", "sequence_length": 64, "steps": 1, "dataset": theirs}
    job_id = guarded.post("/jobs", json=body, headers={"Authorization": f"Bearer {made['other']}"}).json()["id"]
    assert guarded.get("/ui/data").headers["location"] == "/ui/login?next=%2Fui%2Fdata"
    guarded.post("/ui/login", data={"key": made["acme"]})
    for path in (f"/ui/new?from={job_id}", f"/ui/compare?job={job_id}", "/ui/new?from=job_x", "/ui/compare?job=%00"):
        missing = guarded.get(path)
        assert (missing.status_code, missing.headers["content-type"]) == (404, "text/html; charset=utf-8"), path
    for path in PAGES:
        page = guarded.get(path).text
        assert theirs not in page
        assert job_id not in page
    assert guarded.get("/ui/compare?job=a&job=b&job=c").status_code == 422


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Paths of what a request may say; of an object that may be left out, and of a word in its place, its own too."""
    for name, field in model.model_fields.items():
        inner = [each for each in _types(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
        for each in inner:
            yield from _leaves(each, f"{prefix}{name}.")
        if not inner or len(inner) < len(_types(field.annotation)):
            yield prefix + name


def _types(annotation: Any) -> list[Any]:
    """The members of a union, of whatever it is wrapped in."""
    parts = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _types(parts[0])
    if parts and "Union" in str(getattr(annotation, "__origin__", type(annotation))):
        return [each for part in parts for each in _types(part)]
    return [annotation]
