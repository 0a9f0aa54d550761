"""Fine-tuning jobs and models under /v1, through OpenAI's own client."""

from __future__ import annotations

import csv
import json
from typing import Any

import openai
import pytest
from openai import OpenAI
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.openai.translation import default_length
from service import runs
from service.database import transaction
from service.settings import Settings
from service.storage import Storage
from slim_core.config import BUILTIN_MODELS
from tests.integration.openai_client import openai_over
from tests.integration.seed import add_checkpoint, add_dataset, claim, metric

CAP = {"memory_cap": "4GiB"}
MODEL = "performer-tiny"
TOKENS = 14 * 100 + 1
DEFAULT_LENGTH = TOKENS - 1
"""Of a dataset of one document: 2,048 hold it, 1,400 are what its tokens allow."""


@pytest.fixture
def settings(shared_settings: Settings) -> Settings:
    """Every test here has jobs of its own."""
    return shared_settings


@pytest.fixture
def api(client: TestClient) -> OpenAI:
    return openai_over(client)


@pytest.fixture
def file(bind: Engine, storage: Storage) -> str:
    return add_dataset(bind, storage).id


def create(api: OpenAI, file: str, own: dict[str, Any] | None = None, **fields: Any) -> Any:
    return api.fine_tuning.jobs.create(model=MODEL, training_file=file, extra_body=own or CAP, **fields)


def test_a_job_is_what_the_native_api_makes_of_it(api: OpenAI, client: TestClient, file: str) -> None:
    hyperparameters = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}
    job = create(
        api,
        file,
        CAP | {"sequence_length": 100, "keep": 4, "schedule": {"warmup_steps": 2}},
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        validation_file=file,
        suffix="mine",
        seed=7,
        metadata={"team": "a"},
        integrations=None,
    )
    native = client.get(f"/jobs/{job.id}").json()
    expected = {
        "model": MODEL,
        "dataset": file,
        "validation_dataset": file,
        "memory_cap": 4 * 1024**3,
        "sequence_length": 100,
        "epochs": 3,
        "batch_size": 2,
        "keep": 4,
        "name": "mine",
        "seed": 7,
        "metadata": {"team": "a"},
        "method": {"type": "full"},
    }
    assert {name: native[name] for name in expected} == expected
    assert native["optimizer"]["learning_rate"] == 0.5e-3
    assert native["schedule"]["warmup_steps"] == 2
    assert (job.object, job.status, job.result_files, job.trained_tokens) == ("fine_tuning.job", "queued", [], None)
    assert job.hyperparameters.model_dump() == hyperparameters
    assert job.method.supervised.hyperparameters.model_dump() == hyperparameters
    assert (job.training_file, job.validation_file, job.seed, job.metadata) == (file, file, 7, {"team": "a"})
    assert (job.memory_cap, job.paused, job.progress["total_steps"]) == (4 * 1024**3, False, 3 * 7)
    assert job.plan["chunk_length"] == native["plan"]["chunk_length"]
    assert api.fine_tuning.jobs.retrieve(job.id) == job
    assert native["created_at"].startswith("20")


def test_what_is_left_out_has_defaults(api: OpenAI, client: TestClient, file: str) -> None:
    job = create(api, file)
    native = client.get(f"/jobs/{job.id}").json()
    names = ("sequence_length", "epochs", "steps", "batch_size", "seed", "name")
    assert {name: native[name] for name in names} == dict(
        zip(names, (DEFAULT_LENGTH, 1, None, 1, 0, None), strict=True)
    )
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job = create(api, file, CAP | {"steps": 5, "optimizer": {"name": "sgd"}}, hyperparameters=auto)
    assert (job.steps, job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (5, "auto", 1)
    lora = create(api, file, CAP | {"method": {"type": "lora", "rank": 4}})
    assert lora.training_method["rank"] == 4
    assert lora.method.type == "supervised"


@pytest.mark.parametrize(
    ("longest", "tokens", "length"),
    [(1, 100, 64), (64, 1_000, 64), (65, 1_000, 128), (10**6, 10**7, 8_192), (500, 501, 500), (10, 20, 19), (1, 1, 1)],
)
def test_the_default_length_holds_the_longest_document(longest: int, tokens: int, length: int) -> None:
    assert default_length(longest, BUILTIN_MODELS[MODEL], tokens) == length
    assert default_length(10, BUILTIN_MODELS[MODEL], None) == 64


def test_a_length_that_depends_on_tokens_waits_for_them(client: TestClient, api: OpenAI) -> None:
    line = json.dumps({"prompt": "p" * 50, "completion": "c" * 50}).encode() + b"\n"
    file = api.files.create(file=("a.jsonl", line * 20), purpose="fine-tune").id
    with pytest.raises(openai.ConflictError) as early:
        create(api, file)
    assert (early.value.code, early.value.param) == ("dataset_not_tokenized", "training_file")
    assert early.value.response.headers["x-should-retry"] == "true"
    assert create(api, file, CAP | {"sequence_length": 64, "steps": 2}).status == "queued"


@pytest.mark.parametrize(
    ("own", "fields", "param"),
    [
        ({"steps": 2}, {}, "memory_cap"),
        ({"memory_cap": None}, {}, "memory_cap"),
        ({"memory_cap": "much"}, {}, "memory_cap"),
        (CAP | {"stepz": 1}, {}, "stepz"),
        (CAP, {"method": {"type": "dpo"}}, "method"),
        (CAP, {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        (CAP, {"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        (CAP, {"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        (CAP | {"steps": 1}, {"hyperparameters": {"n_epochs": 1}}, "steps"),
        (
            CAP | {"optimizer": {"learning_rate": 1.0}},
            {"hyperparameters": {"learning_rate_multiplier": 11}},
            "hyperparameters.learning_rate_multiplier",
        ),
        (
            CAP,
            {
                "hyperparameters": {"n_epochs": 1},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
            },
            "hyperparameters",
        ),
        (CAP | {"sequence_length": TOKENS}, {}, "training_file"),
        (CAP, {"suffix": "x" * 65}, "suffix"),
        ({"memory_cap": "1MiB"}, {}, "memory_cap"),
    ],
)
def test_a_wrong_request_names_its_field(
    api: OpenAI, file: str, own: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(api, file, own, **fields)
    assert refused.value.param == param
    assert "traceback" not in str(refused.value).lower()


def test_a_cap_that_is_missing_is_asked_for_in_the_clients_words(api: OpenAI, file: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=r'extra_body=\{"memory_cap": "1GiB"\}'):
        api.fine_tuning.jobs.create(model=MODEL, training_file=file)


def test_a_request_that_is_sent_again_with_its_key_makes_one_job(api: OpenAI, client: TestClient, file: str) -> None:
    headers = {"Idempotency-Key": "a-key-of-openai"}
    first = create(api, file, extra_headers=headers)
    again = api.fine_tuning.jobs.with_raw_response.create(
        model=MODEL, training_file=file, extra_body=CAP, extra_headers=headers
    )
    assert again.headers["idempotency-replayed"] == "true"
    assert again.parse() == first
    native = {"model": MODEL, "dataset": file, "memory_cap": "4GiB", "sequence_length": 64, "steps": 1}
    assert client.post("/jobs", json=native, headers=headers).json()["code"] == "idempotency_key_reused"


def test_pause_resume_and_cancel_with_the_empty_bodies_of_the_client(api: OpenAI, file: str) -> None:
    job = create(api, file)
    paused = api.fine_tuning.jobs.pause(job.id)
    assert (paused.status, paused.model_extra is not None and paused.model_extra["paused"]) == ("queued", True)
    resumed = api.fine_tuning.jobs.resume(job.id, extra_body={"memory_cap": "2GiB"})
    assert (resumed.status, resumed.model_extra is not None and resumed.model_extra["memory_cap"]) == (
        "queued",
        2 * 1024**3,
    )
    assert api.fine_tuning.jobs.resume(job.id).status == "queued"
    assert api.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as over:
        api.fine_tuning.jobs.pause(job.id)
    assert over.value.code == "job_state_conflict"
    assert over.value.response.headers["x-should-retry"] == "false"


def test_jobs_are_paged_and_filtered_by_metadata(api: OpenAI, file: str) -> None:
    team = {"metadata": {"team": file, "[odd]": "a&b"}}
    ids = [create(api, file, **team).id for _ in range(2)]
    plain = create(api, file).id
    assert [job.id for job in api.fine_tuning.jobs.list(limit=1)][:3] == [plain, *ids[::-1]]
    assert [job.id for job in api.fine_tuning.jobs.list(limit=1, metadata={"team": file})] == ids[::-1]
    assert list(api.fine_tuning.jobs.list(metadata={"team": file, "other": ""})) == []
    without = {job.id for job in api.fine_tuning.jobs.list(extra_query={"metadata": "null"})}
    assert plain in without
    assert without.isdisjoint(ids)
    for wrong in ("metadata", "metadata[]", "metadata[a"):
        with pytest.raises(openai.UnprocessableEntityError):
            api.fine_tuning.jobs.list(extra_query={wrong: "x"})


def test_what_a_job_leaves(api: OpenAI, client: TestClient, bind: Engine, storage: Storage, file: str) -> None:
    job_id = create(api, file, CAP | {"steps": 4, "keep": 5}, suffix="mine").id
    claimed = claim(bind, job_id)
    with transaction(bind) as session:
        rows = [metric(step, loss=None if step == 2 else 5.0 - step) for step in range(1, 5)]
        runs.record_metrics(session, job_id, claimed.attempt, rows)
        for step in (2, 4):
            add_checkpoint(session, storage, claimed, step, 1.0 / step)
    running = api.fine_tuning.jobs.retrieve(job_id)
    assert (running.status, running.result_files, running.finished_at) == ("running", [], None)
    assert running.estimated_finish is not None
    metrics_id = f"result_{job_id.removeprefix('job_')}_metrics"
    with pytest.raises(openai.NotFoundError):
        api.files.retrieve(metrics_id)
    with transaction(bind) as session:
        runs.finish(session, job_id, claimed.attempt, "succeeded")
    job = api.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.estimated_finish, job.trained_tokens) == ("succeeded", None, 128 * 4)
    assert job.finished_at is not None
    assert job.result_files[0] == metrics_id
    assert [listed for listed in api.fine_tuning.jobs.list() if listed.id == job_id] == [job]

    files = {api.files.retrieve(file_id).filename: file_id for file_id in job.result_files}
    assert list(files) == ["step_metrics.csv", "config.json", "model.safetensors"]
    content = api.files.content(metrics_id)
    rows = list(csv.DictReader(content.text.splitlines()))
    assert [row["train_loss"] for row in rows] == ["4.0", "", "2.0", "1.0"]
    described = api.files.retrieve(metrics_id)
    assert (described.purpose, described.status, described.bytes) == (
        "fine-tune-results",
        "processed",
        len(content.content),
    )
    headers = {"range": "bytes=0-3", "if-range": content.response.headers["etag"]}
    assert client.get(f"/v1/files/{metrics_id}/content", headers=headers).content == b"step"
    weights = storage.path(f"{claimed.checkpoints_dir}/step-00000004/model.safetensors").read_bytes()
    assert api.files.content(files["model.safetensors"]).content == weights
    with pytest.raises(openai.ConflictError):
        api.files.delete(metrics_id)
    for wrong in (f"{metrics_id}x", files["model.safetensors"][:-1] + "7", "result_1"):
        with pytest.raises(openai.NotFoundError) as missing:
            api.files.content(wrong)
        assert missing.value.code == "file_not_found"

    newest, older = api.fine_tuning.jobs.checkpoints.list(job_id, limit=1)
    assert (newest.step_number, older.step_number) == (4, 2)
    assert newest.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert newest.metrics.model_dump(exclude_none=True) == {"step": 4, "train_loss": 1.0, "valid_loss": 0.25}
    assert older.metrics.train_loss is None
    assert newest.model_extra is not None
    assert newest.model_extra["files"] == job.result_files[1:]


def test_events_are_listed_newest_first(api: OpenAI, client: TestClient, file: str) -> None:
    job_id = create(api, file).id
    api.fine_tuning.jobs.cancel(job_id)
    events = list(api.fine_tuning.jobs.list_events(job_id, limit=1))
    assert [event.message.split(":")[0] for event in events] == [
        "The job was cancelled",
        "Planned",
        "Job created and queued",
    ]
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    native = client.get(f"/jobs/{job_id}/events").json()["data"]
    assert [event.id for event in events] == [f"event_{row['id']}" for row in reversed(native)]
    with pytest.raises(openai.NotFoundError):
        list(api.fine_tuning.jobs.list_events("job_" + "0" * 32))


def test_models_are_those_of_the_native_api(api: OpenAI, client: TestClient, bind: Engine, storage: Storage) -> None:
    file = add_dataset(bind, storage).id
    job_id = create(api, file, suffix="named").id
    claimed = claim(bind, job_id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, claimed, 4)
        runs.finish(session, job_id, claimed.attempt, "succeeded")
    model_id = api.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    assert model_id is not None
    assert {model.id for model in api.models.list()} >= {MODEL, model_id}
    model = api.models.retrieve(model_id)
    assert (model.object, model.owned_by, model.model_extra) == (
        "model",
        "default",
        {"name": "named", "kind": "output", "status": "ready"},
    )
    assert api.models.delete(model_id).model_dump() == {"id": model_id, "object": "model", "deleted": True}
    left = api.fine_tuning.jobs.retrieve(job_id)
    assert (left.fine_tuned_model, len(left.result_files)) == (None, 1)
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve(model_id)
    with pytest.raises(openai.ConflictError):
        api.models.delete(MODEL)


def test_the_rest_of_openais_api_says_what_there_is(api: OpenAI, client: TestClient) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/fine_tuning/jobs") as missing:
        api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert missing.value.code == "not_found"
    assert client.put("/v1/models").status_code == 405
    with pytest.raises(openai.BadRequestError) as malformed:
        api.post("/fine_tuning/jobs", cast_to=object, content=b"\xff")
    assert malformed.value.code == "malformed_body"
