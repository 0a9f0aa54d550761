"""Plans and jobs over HTTP."""

from __future__ import annotations

import csv
import json
import time
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from api.app import create_app
from cli.embedded import EmbeddedServers
from service import database, queue, runs
from service.database import transaction
from service.settings import Settings
from service.storage import Storage
from slim_core.config import LoraConfig, TrainConfig
from tests.integration.seed import add_checkpoint, add_dataset, claim, metric

TOKENS = 14 * 100 + 1


@pytest.fixture
def dataset(bind: Engine, storage: Storage) -> str:
    return add_dataset(bind, storage).id


@pytest.fixture
def body(dataset: str) -> dict[str, Any]:
    return {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 128, "steps": 10}


@pytest.fixture(scope="module")
def shared_body(shared_settings: Settings) -> dict[str, Any]:
    bind = database.engine(shared_settings)
    dataset = add_dataset(bind, Storage(shared_settings.data_dir)).id
    bind.dispose()
    return {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 128, "steps": 10}


def create(client: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_a_job_is_planned_stored_and_announced(
    client: TestClient, body: dict[str, Any], servers: EmbeddedServers, bind: Engine
) -> None:
    answer = client.post("/jobs", json={**body, "name": "mine", "metadata": {"team": "a"}})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["name"], job["attempt"], job["error"]) == ("queued", "mine", 0, None)
    assert (job["memory_cap"], job["batch_size"], job["keep"], job["chunking"]) == (4 * 1024**3, 1, 2, "auto")
    assert job["metadata"] == {"team": "a"}
    assert job["optimizer"]["learning_rate"] == 1e-3
    plan = job["plan"]
    assert sum(plan["breakdown"].values()) == plan["predicted_peak_bytes"] == job["predicted_peak_bytes"]
    assert plan["num_chunks"] == -(-128 // plan["chunk_length"])
    assert job["progress"]["total_steps"] == 10
    assert job["progress"]["eta_seconds"] == pytest.approx(10 * plan["predicted_step_seconds"])
    assert client.get(f"/jobs/{job['id']}").json() == job
    with redis.Redis(unix_socket_path=str(servers.redis_socket)) as broker:
        assert broker.llen(queue.QUEUE) == 1
    claimed = claim(bind, job["id"])
    assert TrainConfig.from_json(claimed.train).steps == 10


def test_every_way_to_train_reaches_the_trainer(client: TestClient, body: dict[str, Any], bind: Engine) -> None:
    plain = create(client, body)
    options = {
        "optimizer": {"name": "sgd", "momentum": 0.5},
        "method": {"type": "lora", "rank": 4, "targets": ["mlp_in", "query"]},
        "precision": "bfloat16",
        "dropout": 0.1,
        "label_smoothing": 0.2,
    }
    job = create(client, {**body, **options})
    assert job["method"] == {**options["method"], "alpha": 16.0}  # type: ignore[dict-item]
    assert job["plan"]["breakdown"]["gradients"] < plain["plan"]["breakdown"]["gradients"] / 10
    assert (plain["method"], plain["precision"], plain["dropout"]) == ({"type": "full"}, "float32", 0.0)
    train = TrainConfig.from_json(claim(bind, job["id"]).train)
    assert train.lora == LoraConfig(4, 16.0, ("mlp_in", "query"))
    assert (train.optimizer.name, train.optimizer.momentum) == ("sgd", 0.5)
    assert (train.precision, train.dropout, train.label_smoothing) == ("bfloat16", 0.1, 0.2)


def test_what_would_fit_is_said_with_numbers(client: TestClient, body: dict[str, Any]) -> None:
    """Every change that is suggested is one that does fit."""
    body |= {"model": "performer-enwik8", "memory_cap": "16GiB"}
    least = client.post("/plans", json=body).json()["minimum_cap_bytes"]
    problem = client.post("/plans", json={**body, "memory_cap": int(0.8 * least)}).json()
    for words, change in (
        ("adafactor", {"optimizer": {"name": "adafactor"}}),
        ("lora", {"method": {"type": "lora"}}),
    ):
        assert any(words in suggestion for suggestion in problem["suggestions"])
        assert client.post("/plans", json={**body, **change, "memory_cap": int(0.8 * least)}).status_code == 200


def test_a_202_means_that_the_job_is_committed(
    client: TestClient, body: dict[str, Any], servers: EmbeddedServers, bind: Engine
) -> None:
    """A commit that fails must fail the request, and wake nobody."""
    with bind.begin() as connection:
        refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$"
        connection.execute(text(refuse))
        trigger = "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED"
        connection.execute(text(f"{trigger} FOR EACH ROW EXECUTE FUNCTION refuse()"))
    assert client.post("/jobs", json=body).status_code == 500
    assert client.get("/jobs").json()["data"] == []
    with redis.Redis(unix_socket_path=str(servers.redis_socket)) as broker:
        assert broker.llen(queue.QUEUE) == 0


def test_a_job_does_not_need_the_broker(settings: Settings, body: dict[str, Any]) -> None:
    settings = settings.model_copy(update={"redis_url": "redis+socket:///nowhere/redis.sock"})
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        started = time.monotonic()
        job = create(client, body)
        assert time.monotonic() - started < 2  # the test client waits for what runs after the answer as well
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "queued"


@pytest.mark.parametrize(
    ("batch_size", "sequence_length", "epochs", "steps"),
    [
        (1, 100, 1, 14),
        (1, 100, 3, 42),
        (4, 100, 1, 4),
        (4, 100, 5, 20),
        (1, 1400, 1, 1),
        (9, 1400, 2, 2),
        (1, 467, 1, 2),
        (1, 1399, 1, 1),
    ],
)
def test_epochs_become_steps(
    client: TestClient, body: dict[str, Any], batch_size: int, sequence_length: int, epochs: int, steps: int
) -> None:
    del body["steps"]
    body |= {"batch_size": batch_size, "sequence_length": sequence_length, "epochs": epochs}
    job = create(client, body)
    assert (job["epochs"], job["steps"], job["progress"]["total_steps"]) == (epochs, None, steps)
    assert client.post("/plans", json=body).json()["total_steps"] == steps


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_dataset_needs_one_window(
    client: TestClient, bind: Engine, storage: Storage, body: dict[str, Any], field: str
) -> None:
    small = add_dataset(bind, storage, "x" * 127)  # 128 tokens, and a window takes 129
    answer = client.post("/jobs", json={**body, field: small.id})
    assert answer.status_code == 422
    expected = {
        "code": "dataset_too_small",
        "field": field,
        "tokens": 128,
        "required_tokens": 129,
        "max_sequence_length": 127,
        "dataset": small.id,
    }
    assert expected.items() <= answer.json().items()
    assert create(client, {**body, field: add_dataset(bind, storage, "x" * 128).id})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steps": None}, "steps"),
        ({"epochs": 1}, "steps"),
        ({"evaluate_every": 5}, "evaluate_every"),
        ({"early_stopping": {}}, "early_stopping"),
        ({"chunking": {"chunk_length": 129}}, "chunking.chunk_length"),
        ({"chunking": {"chunk_length": 0}}, "chunking.chunk_length"),
        ({"chunking": {"chunk_length": 8, "state_policy": "lose"}}, "chunking.state_policy"),
        ({"chunking": "manual"}, "chunking"),
        ({"chunking": None}, "chunking"),
        ({"keep": 1}, "keep"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"sequence_length": "128"}, "sequence_length"),
        ({"sequence_length": 128.0}, "sequence_length"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"steps": 10**30}, "steps"),
        ({"memory_cap": 0}, "memory_cap"),
        ({"memory_cap": "lots"}, "memory_cap"),
        ({"memory_cap": 2**63}, "memory_cap"),
        ({"memory_cap": "99999999999TiB"}, "memory_cap"),
        ({"gradient_clip": 0}, "gradient_clip"),
        ({"optimizer": {"name": "adam"}}, "optimizer"),
        ({"optimizer": {"name": ["sgd"]}}, "optimizer"),
        ({"optimizer": {"name": "sgd", "beta1": 0.9}}, "optimizer.beta1"),
        ({"optimizer": {"name": "adafactor", "momentum": 0.9}}, "optimizer.momentum"),
        ({"method": {"type": "prefix"}}, "method"),
        ({"method": {"rank": 8}}, "method.rank"),
        ({"method": {"type": "lora", "rank": 0}}, "method.rank"),
        ({"method": {"type": "lora", "targets": []}}, "method.targets"),
        ({"method": {"type": "lora", "targets": ["query", "query"]}}, "method.targets"),
        ({"method": {"type": "lora", "targets": ["output"]}}, "method.targets"),  # performer-tiny has none
        ({"method": {"type": "lora", "targets": ["head"]}}, "method.targets.0"),
        ({"precision": "float16"}, "precision"),
        ({"dropout": 1.0}, "dropout"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum"),
        ({"schedule": {"warmup_steps": -1}}, "schedule.warmup_steps"),
        ({"surprise": 1}, "surprise"),
        ({"architecture": {}}, "architecture"),
        ({"name": ""}, "name"),
        ({"name": "n" * 201}, "name"),
        ({"name": "nul\0"}, "name"),
        ({"name": "half \ud800"}, "name"),
        ({"metadata": {"k": "\udfff"}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata"),
        ({"dataset": None}, "dataset"),
        ({"model": ""}, "model"),
    ],
)
def test_a_broken_rule_is_named(
    shared_client: TestClient, shared_body: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    content = json.dumps({**shared_body, **change})
    answer = shared_client.post("/jobs", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert problem["code"] == "invalid_request"
    assert [error["field"] for error in problem["errors"]] == [field]
    assert problem["error"]["param"] == field
    assert shared_client.get("/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dataset": "ds_" + "0" * 32}, "dataset_not_found"),
        ({"dataset": "../x"}, "dataset_not_found"),
        ({"validation_dataset": "ds_" + "0" * 32}, "dataset_not_found"),
        ({"model": "model_" + "0" * 32}, "model_not_found"),
        ({"model": "performer-huge"}, "model_not_found"),
    ],
)
def test_what_a_job_names_must_exist(
    shared_client: TestClient, shared_body: dict[str, Any], change: dict[str, Any], code: str
) -> None:
    answer = shared_client.post("/jobs", json={**shared_body, **change})
    assert (answer.status_code, answer.json()["code"]) == (404, code)


def test_a_cap_that_nothing_fits_under_says_what_would(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/jobs", json={**body, "memory_cap": "10MB"})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "memory_cap_infeasible")
    assert problem["memory_cap_bytes"] == 10_000_000
    assert problem["minimum_cap_bytes"] > 10_000_000
    assert problem["max_sequence_length"] == 0
    assert problem["suggestions"]
    assert client.get("/jobs").json()["data"] == []
    assert client.post("/jobs", json={**body, "memory_cap": problem["minimum_cap_bytes"]}).status_code == 202


def test_a_paused_job_goes_on_under_another_cap(client: TestClient, body: dict[str, Any], bind: Engine) -> None:
    body |= {"sequence_length": 1000, "memory_cap": "4GiB"}
    job = create(client, body)
    url = f"/jobs/{job['id']}"
    least, most = job["plan"]["minimum_cap_bytes"], job["plan"]["predicted_peak_bytes"]
    cap = (least + most) // 2
    conflict = client.post(f"{url}/resume", json={"memory_cap": cap})
    assert (conflict.status_code, conflict.json()["code"]) == (409, "job_state_conflict")

    client.post(f"{url}/pause")
    refused = client.post(f"{url}/resume", json={"memory_cap": least - 1})
    assert (refused.status_code, refused.json()["minimum_cap_bytes"]) == (422, least)
    assert client.post(f"{url}/resume", json={"memory_cap": "lots"}).status_code == 422
    after = client.get(url).json()
    assert (after["status"], after["memory_cap"], after["plan"]) == ("paused", 4 * 1024**3, job["plan"])

    resumed = client.post(f"{url}/resume", json={"memory_cap": cap}).json()
    assert (resumed["status"], resumed["memory_cap"]) == ("queued", cap)
    assert resumed["plan"]["num_chunks"] > job["plan"]["num_chunks"]
    assert resumed["predicted_peak_bytes"] == resumed["plan"]["predicted_peak_bytes"] <= cap
    types = [event["type"] for event in client.get(f"{url}/events").json()["data"]]
    assert types == ["queued", "planned", "paused", "resumed", "replanned"]
    claimed = claim(bind, job["id"])
    assert claimed.memory_cap_bytes == cap
    assert resumed["plan"].items() <= claimed.plan.items()


def test_a_finished_job_has_a_certificate(
    client: TestClient, body: dict[str, Any], bind: Engine, storage: Storage
) -> None:
    """Of what was promised and what was measured, the check's peak included; no other job has one."""
    job = create(client, body)
    url = f"/jobs/{job['id']}"
    assert (job["certificate"], job["probed_peak_bytes"]) == (None, None)
    run = claim(bind, job["id"])
    check = {"chunk_length": 128, "compared_with": 64, "relative_error": 2e-7}
    with transaction(bind) as session:
        runs.record_probe(session, run.id, run.attempt, 200)
        runs.record_metrics(session, run.id, run.attempt, [metric(10, peak_bytes=300)])
        runs.record_gradient_check(session, run.id, run.attempt, 400, check)
        add_checkpoint(session, storage, run, 10)
        runs.finish(session, run.id, run.attempt, "succeeded")
    certificate = client.get(url).json()["certificate"]
    assert certificate == {
        "memory_cap_bytes": 4 * 1024**3,
        "predicted_peak_bytes": job["predicted_peak_bytes"],
        "probed_peak_bytes": 200,
        "measured_peak_bytes": 400,
        "cap_held": True,
        "num_chunks": job["plan"]["num_chunks"],
        "gradient_check": check,
    }


def test_a_job_that_goes_on_keeps_its_own_chunks(client: TestClient, body: dict[str, Any]) -> None:
    job = create(client, {**body, "batch_size": 8, "chunking": {"chunk_length": 32, "state_policy": "reverse"}})
    url = f"/jobs/{job['id']}"
    client.post(f"{url}/pause")
    plan = client.post(f"{url}/resume", json={"memory_cap": job["plan"]["minimum_cap_bytes"]}).json()["plan"]
    assert plan["chunk_length"] == 32
    assert plan["micro_batch_size"] < job["plan"]["micro_batch_size"]


def test_a_plan_is_that_of_the_job_and_stores_nothing(client: TestClient, body: dict[str, Any]) -> None:
    body["chunking"] = {"chunk_length": 32, "state_policy": "keep"}
    plan = client.post("/plans", json=body).json()
    assert plan["chunk_length"] == 32
    assert client.get("/jobs").json()["data"] == []
    job = create(client, body)
    assert job["plan"].items() <= plan.items()
    assert job["chunking"] == body["chunking"]


def test_a_plan_needs_no_dataset_unless_it_counts_epochs(client: TestClient, body: dict[str, Any]) -> None:
    del body["dataset"]
    assert client.post("/plans", json=body).status_code == 200
    answer = client.post("/plans", json={**body, "steps": None, "epochs": 1})
    assert [error["field"] for error in answer.json()["errors"]] == ["epochs"]
    assert client.post("/jobs", json=body).json()["errors"][0]["field"] == "dataset"


def test_a_validation_dataset_alone_is_used_at_the_end(
    client: TestClient, bind: Engine, body: dict[str, Any], dataset: str
) -> None:
    job = create(client, {**body, "validation_dataset": dataset})
    claimed = claim(bind, job["id"])
    assert claimed.train["evaluate_every"] == 10
    assert claimed.validation_path == claimed.dataset_path


def test_pages_filters_and_requests(client: TestClient, body: dict[str, Any], bind: Engine) -> None:
    ids = [create(client, body)["id"] for _ in range(5)]
    first = client.get("/jobs", params={"limit": 2}).json()
    second = client.get("/jobs", params={"limit": 100, "after": first["data"][-1]["id"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    alone = client.get(f"/jobs/{ids[-1]}").json()
    assert alone["plan"].pop("frontier") != []
    assert first["data"][0] == alone

    assert client.post(f"/jobs/{ids[0]}/pause").json()["status"] == "paused"
    assert client.post(f"/jobs/{ids[0]}/pause").json()["status"] == "paused"
    assert [job["id"] for job in client.get("/jobs", params={"status": "paused"}).json()["data"]] == [ids[0]]
    assert client.post(f"/jobs/{ids[0]}/resume").json()["status"] == "queued"
    claim(bind, ids[1])
    running = client.post(f"/jobs/{ids[1]}/cancel").json()
    assert (running["status"], running["desired"]) == ("running", "cancel")
    cancelled = client.post(f"/jobs/{ids[0]}/cancel").json()
    assert (cancelled["status"], cancelled["progress"]["eta_seconds"]) == ("cancelled", None)
    assert client.post(f"/jobs/{ids[0]}/cancel").json() == cancelled
    answer = client.post(f"/jobs/{ids[0]}/resume")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_state_conflict")
    assert answer.json()["job_status"] == "cancelled"


def test_resuming_wakes_a_worker(client: TestClient, body: dict[str, Any], servers: EmbeddedServers) -> None:
    job_id = create(client, body)["id"]
    client.post(f"/jobs/{job_id}/pause")
    with redis.Redis(unix_socket_path=str(servers.redis_socket)) as broker:
        broker.flushall()
        client.post(f"/jobs/{job_id}/resume")
        assert broker.llen(queue.QUEUE) == 1


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "limit=x", "limit=" + "9" * 30, "after=x", "after=job_%00", "status=lost", "status=%ff"],
)
def test_a_bad_page_is_refused(shared_client: TestClient, query: str) -> None:
    answer = shared_client.get(f"/jobs?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize("job_id", ["x", "job_" + "0" * 32, "%00", "%ff", "..%2f..", "a" * 4_000])
def test_an_unknown_job_is_a_404_everywhere(shared_client: TestClient, job_id: str) -> None:
    for what in ("", "/events", "/metrics", "/checkpoints", "/checkpoints/latest", "/checkpoints/1/files/x"):
        answer = shared_client.get(f"/jobs/{job_id}{what}")
        assert (answer.status_code, what) == (404, what)
        assert answer.headers["content-type"] == "application/problem+json"
    for action in ("cancel", "pause", "resume"):
        assert shared_client.post(f"/jobs/{job_id}/{action}").status_code == 404


def test_progress_metrics_and_events_of_a_run(client: TestClient, body: dict[str, Any], bind: Engine) -> None:
    job_id = create(client, body)["id"]
    claimed = claim(bind, job_id)
    with transaction(bind) as session:
        rows = [metric(1), metric(2), metric(3, loss=float("nan"))]
        runs.record_metrics(session, job_id, claimed.attempt, rows)
        runs.record_evaluation(session, job_id, claimed.attempt, 2, 4.25)
    job = client.get(f"/jobs/{job_id}").json()
    assert job["progress"] == {
        "step": 3,
        "total_steps": 10,
        "tokens": 384,
        "loss": None,
        "step_seconds": 0.25,
        "eta_seconds": 1.75,
    }
    assert job["measured_peak_bytes"] == 300_000_003
    assert job["started_at"].endswith("Z")
    page = client.get(f"/jobs/{job_id}/metrics", params={"after_step": 1, "limit": 1}).json()
    assert page["has_more"]
    assert [(row["step"], row["loss"], row["validation_loss"]) for row in page["data"]] == [(2, 4.8, 4.25)]
    answer = client.get(f"/jobs/{job_id}/metrics", headers={"accept": "text/csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    table = list(csv.DictReader(answer.text.splitlines()))
    assert [(row["step"], row["loss"], row["validation_loss"]) for row in table] == [
        ("1", "4.9", ""),
        ("2", "4.8", "4.25"),
        ("3", "", ""),
    ]
    events = client.get(f"/jobs/{job_id}/events", params={"limit": 3}).json()
    assert [event["type"] for event in events["data"]] == ["queued", "planned", "started"]
    rest = client.get(f"/jobs/{job_id}/events", params={"after": events["data"][-1]["id"]}).json()
    assert [event["type"] for event in rest["data"]] == ["evaluation"]
    assert (events["has_more"], rest["has_more"]) == (True, False)


def test_a_failed_job_says_why(client: TestClient, body: dict[str, Any], bind: Engine) -> None:
    job_id = create(client, body)["id"]
    claimed = claim(bind, job_id)
    error = {"code": "diverged", "message": "The loss is not finite.", "step": 7, "hint": "Lower the learning rate."}
    with transaction(bind) as session:
        runs.finish(session, job_id, claimed.attempt, "failed", error=error)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["error"]) == ("failed", error)


def test_a_job_may_start_from_the_output_of_another(
    client: TestClient, body: dict[str, Any], bind: Engine, storage: Storage
) -> None:
    job_id = create(client, {**body, "name": "first"})["id"]
    claimed = claim(bind, job_id)
    with transaction(bind) as session:
        add_checkpoint(session, storage, claimed, 10)
        runs.finish(session, job_id, claimed.attempt, "succeeded")
    model_id = client.get(f"/jobs/{job_id}").json()["output_model"]
    model = client.get(f"/models/{model_id}").json()
    assert (model["name"], model["kind"], model["job"], model["step"]) == ("first", "output", job_id, 10)
    builtin = client.get("/models/performer-tiny").json()
    assert (model["config"], model["num_parameters"]) == (builtin["config"], builtin["num_parameters"])
    listed = client.get("/models").json()["data"]
    assert [item["kind"] for item in listed] == ["built_in", "built_in", "built_in", "output"]
    assert client.get("/models", params={"after": model_id}).json() == {"data": [], "has_more": False}

    second = create(client, {**body, "model": model_id})
    assert second["model"] == model_id
    assert client.delete(f"/models/{model_id}").json()["code"] == "model_in_use"
    assert client.delete("/models/performer-tiny").json()["code"] == "model_built_in"
    assert claim(bind, second["id"]).initial_weights_path == f"{claimed.checkpoints_dir}/step-00000010"
    client.post(f"/jobs/{second['id']}/cancel")
    with transaction(bind) as session:
        runs.finish(session, second["id"], 1, "cancelled")
    assert client.delete(f"/models/{model_id}").status_code == 204
    assert client.get(f"/models/{model_id}").status_code == 404
    assert not storage.path(f"{claimed.checkpoints_dir}/step-00000010").exists()
    assert client.get(f"/jobs/{job_id}").json()["output_model"] is None
