"""/v1 with keys: whose files and uploads they are, what a key allows, in OpenAI's exceptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine, func, update
from starlette.testclient import TestClient

from api.app import create_app
from service import keys, quotas
from service.database import transaction
from service.limits import Limits
from service.models import PartUpload
from service.settings import Settings
from service.upload_states import GRACE
from tests.integration.openai_client import openai_over

TEXT = b"some text, and more of it\n" * 40


@pytest.fixture
def keyed(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as running:
        yield running


@pytest.fixture
def as_tenant(keyed: TestClient, bind: Engine) -> Callable[..., OpenAI]:
    def client_of(tenant: str, **limits: int) -> OpenAI:
        with transaction(bind) as session:
            _, key = keys.create(session, tenant, "a key", Limits(**limits))
        return openai_over(keyed, key)

    return client_of


def test_a_client_without_a_key_gets_an_authentication_error(keyed: TestClient) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        openai_over(keyed, "sk-of-another-house").models.list()
    assert refused.value.code == "unauthorized"


def test_another_tenants_things_are_not_there(as_tenant: Callable[..., OpenAI]) -> None:
    mine, other = as_tenant("mine"), as_tenant("other")
    file = mine.files.create(file=("a.txt", TEXT), purpose="fine-tune").id
    job = mine.fine_tuning.jobs.create(model="performer-tiny", training_file=file, extra_body={"memory_cap": "4GiB"})
    assert job.organization_id == "mine"
    upload = mine.uploads.create(bytes=4, filename="a.txt", mime_type="text/plain", purpose="fine-tune").id
    part = mine.uploads.parts.create(upload, data=b"text").id
    mine.fine_tuning.jobs.cancel(job.id)
    result = mine.fine_tuning.jobs.retrieve(job.id).result_files[0]
    assert [*other.files.list(), *other.fine_tuning.jobs.list()] == []
    attempts: list[Callable[[], object]] = [
        lambda: other.files.retrieve(file),
        lambda: other.files.content(file),
        lambda: other.files.delete(file),
        lambda: other.files.content(result),
        lambda: other.fine_tuning.jobs.retrieve(job.id),
        lambda: other.fine_tuning.jobs.cancel(job.id),
        lambda: list(other.fine_tuning.jobs.list_events(job.id)),
        lambda: list(other.fine_tuning.jobs.checkpoints.list(job.id)),
        lambda: other.uploads.parts.create(upload, data=b"text"),
        lambda: other.uploads.complete(upload, part_ids=[part]),
        lambda: other.uploads.cancel(upload),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()
    completed = mine.uploads.complete(upload, part_ids=[part])
    assert completed.file is not None
    assert other.files.list().data == []


def test_what_a_key_allows_holds_here_too(as_tenant: Callable[..., OpenAI]) -> None:
    api = as_tenant("small", max_bytes=2 * len(TEXT), max_jobs=1)
    file = api.files.create(file=("a.txt", TEXT), purpose="fine-tune").id

    def begin(size: int) -> str:
        return api.uploads.create(bytes=size, filename="b.txt", mime_type="text/plain", purpose="fine-tune").id

    upload = begin(len(TEXT))
    refusals: list[Callable[[], object]] = [
        lambda: begin(1),  # beside the one that is open
        lambda: api.files.create(file=("b.txt", TEXT + b"x"), purpose="fine-tune"),
    ]
    for refused in refusals:
        with pytest.raises(openai.APIStatusError) as full:
            refused()
        assert (full.value.status_code, full.value.code) == (413, "storage_quota_exceeded")
    api.uploads.cancel(upload)

    def create() -> object:
        return api.fine_tuning.jobs.create(
            model="performer-tiny", training_file=file, extra_body={"memory_cap": "4GiB"}
        )

    create()
    with pytest.raises(openai.RateLimitError) as many:
        create()
    assert many.value.code == "too_many_jobs"
    assert many.value.response.headers["x-should-retry"] == "false"


def test_uploads_in_parts_hold_room_from_their_beginning_to_their_end(
    as_tenant: Callable[..., OpenAI], bind: Engine
) -> None:
    """What is announced, and what parts hold beyond it, counts; what is completed counts once."""
    size = len(TEXT)
    api = as_tenant("small", max_bytes=2 * size)

    def in_use() -> int:
        with transaction(bind, "small") as session:
            return quotas.bytes_in_use(session)

    def begin() -> str:
        return api.uploads.create(bytes=size, filename="b.txt", mime_type="text/plain", purpose="fine-tune").id

    def refused(act: Callable[[], object]) -> None:
        with pytest.raises(openai.APIStatusError) as full:
            act()
        assert (full.value.status_code, full.value.code) == (413, "storage_quota_exceeded")

    first, second = begin(), begin()
    assert in_use() == 2 * size
    refused(lambda: api.files.create(file=("a.txt", b"x"), purpose="fine-tune"))
    part = api.uploads.parts.create(first, data=TEXT).id
    refused(lambda: api.uploads.parts.create(first, data=TEXT[:1]))  # beyond what was announced
    assert api.uploads.complete(first, part_ids=[part]).status == "completed"
    assert in_use() == 2 * size
    api.uploads.cancel(second)
    assert in_use() == size
    third = begin()
    with transaction(bind) as session:
        session.execute(update(PartUpload).where(PartUpload.id == third).values(expires_at=func.now() - GRACE))
    assert in_use() == size
    api.files.create(file=("c.txt", TEXT), purpose="fine-tune")
