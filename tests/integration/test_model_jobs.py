"""Uploaded models in jobs: from the files of a Llama to a checkpoint that has its layout again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from slim_core.weights.folder import check_folder
from tests.integration.model_files import LLAMA, Files, llama
from tests.integration.stage import Stage, open_stage
from tests.integration.test_api_models import post
from worker.preparer import Preparer
from worker.supervisor import supervise

JOB = {
    "memory_cap": "1GiB",
    "sequence_length": 128,
    "batch_size": 2,
    "steps": 6,
    "validation_fraction": 0.3,
    "evaluate_every": 3,
    "optimizer": {"name": "adamw", "learning_rate": 0.003},
    "chunking": {"chunk_length": 48},
}
WEIGHTS = "model.safetensors"


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


@pytest.fixture
def client(stage: Stage) -> Iterator[TestClient]:
    with TestClient(create_app(stage.settings), base_url="http://127.0.0.1") as running:
        yield running


def a_dataset(client: TestClient) -> str:
    names = ("assert", "assignment", "import", "lambda", "numbers", "integers", "del", "with")
    lines = "\n".join(json.dumps({"text": topics[name][:3_000]}) for name in names)
    created: str = client.post("/datasets", files={"file": ("topics.jsonl", lines)}).json()["id"]
    return created


def upload(client: TestClient, files: Files) -> str:
    answer = post(client, files)
    assert answer.status_code == 201, answer.text
    created: str = answer.json()["id"]
    return created


def run(client: TestClient, stage: Stage, **changes: Any) -> dict[str, Any]:
    """A job from request to end, by the real trainer."""
    answer = client.post("/jobs", json=JOB | changes)
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    supervise(job_id, stage.settings, device_wait_seconds=0.2)
    job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
    assert job["status"] == "succeeded", job["error"]
    return job


def prepare(stage: Stage, **programs: str) -> None:
    """All that waits for the preparer."""
    preparer = Preparer(stage.bind, stage.settings, "a test", **programs)
    while preparer.step():
        pass


def validation_losses(client: TestClient, job: dict[str, Any]) -> dict[int, float]:
    rows = client.get(f"/jobs/{job['id']}/metrics").json()["data"]
    return {row["step"]: row["validation_loss"] for row in rows if row["validation_loss"] is not None}


def test_a_llama_comes_back_as_a_llama_and_is_a_start_for_others(
    client: TestClient, stage: Stage, tmp_path: Path
) -> None:
    model, dataset = upload(client, llama()), a_dataset(client)
    lora = {"type": "lora", "rank": 4, "alpha": 8.0, "targets": ["query", "key_value", "mlp_out"]}
    job = run(client, stage, model=model, dataset=dataset, method=lora)
    assert job["plan"]["state_policy"] == "prefix"
    losses = validation_losses(client, job)
    assert list(losses) == [0, 3, 6]
    assert losses[6] < losses[0]

    final = client.get(f"/jobs/{job['id']}/checkpoints/final").json()
    folder = tmp_path / "download"
    for file in final["files"]:
        answer = client.get(f"/jobs/{job['id']}/checkpoints/final/files/{file['name']}")
        assert len(answer.content) == file["bytes"]
        (folder / file["name"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / file["name"]).write_bytes(answer.content)
    assert (folder / "adapter" / "adapter_config.json").exists()
    assert check_folder(folder).layout == "llama"
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in LLAMA} == LLAMA
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == llama()[name]
    card = (folder / "README.md").read_text()
    assert model in card
    assert f"| 0 |  | {losses[0]:.4f} |" in card
    assert "from transformers import" in card

    output = client.get(f"/models/{job['output_model']}").json()
    assert (output["kind"], output["layout"], output["tokenizer"]) == ("output", "llama", "own")
    again = run(client, stage, model=output["id"], dataset=dataset, steps=1)
    assert validation_losses(client, again)[0] == pytest.approx(losses[6], abs=1e-4)
    prepare(stage)
    # What a finished job started from may go.
    assert client.delete(f"/models/{model}").status_code == 204


def test_performer_takes_the_weights_along(client: TestClient, stage: Stage) -> None:
    model, dataset = upload(client, llama()), a_dataset(client)
    job = run(client, stage, model=model, dataset=dataset, attention="performer")
    assert (job["attention"], job["plan"]["state_policy"]) == ("performer", "keep")
    losses = validation_losses(client, job)
    assert losses[6] < losses[0]
    output = client.get(f"/models/{job['output_model']}").json()
    wanted = {"attention": "performer", "feature_map": "favor", "num_features": 16, "num_kv_heads": 2}
    assert wanted.items() <= output["config"].items()
    assert (output["layout"], output["tokenizer"]) == ("slimtune", "own")
    refused = client.post("/plans", json=JOB | {"model": output["id"], "dataset": dataset, "attention": "softmax"})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "attention")


def test_performer_learns_what_softmax_attention_gave_before_the_first_step(client: TestClient, stage: Stage) -> None:
    model, dataset = upload(client, llama()), a_dataset(client)
    matching = {"steps": 4, "learning_rate": 0.01, "sequence_length": 32}
    method = {"type": "lora", "rank": 4, "alpha": 8.0, "targets": ["query", "key_value"]}
    changes = {"attention": "performer", "method": method, "matching": matching}
    job = run(client, stage, model=model, dataset=dataset, **changes)
    assert job["matching"] == matching
    events = client.get(f"/jobs/{job['id']}/events").json()["data"]
    reports = [event["data"] for event in events if event["type"] == "matching"]
    assert [(report["step"], report["of"]) for report in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(report["relative_error"] > 0 for report in reports)
    kinds = [event["type"] for event in events]
    assert kinds.index("training") < kinds.index("matching") < kinds.index("checkpoint") < kinds.index("evaluation")

    body = JOB | {"model": model, "dataset": dataset} | changes
    changes_by_field: dict[str, dict[str, Any]] = {
        "matching": {"attention": None},
        "method": {"method": {"type": "full"}},
        "method.targets": {"method": method | {"targets": ["mlp_in"]}},
        "matching.steps": {"matching": {"steps": 0}},
    }
    for field, changed in changes_by_field.items():
        answer = client.post("/jobs", json=body | changed)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), answer.text


def test_what_a_model_does_not_allow_is_named(client: TestClient, stage: Stage) -> None:
    dataset = a_dataset(client)
    model = upload(client, llama())
    files = llama(LLAMA | {"vocab_size": 200})
    small = {name: files[name] for name in ("config.json", WEIGHTS)}
    body = JOB | {"dataset": dataset}
    lora = {"type": "lora", "rank": 4, "alpha": 8.0, "targets": ["head"]}
    cases: dict[str, dict[str, Any]] = {
        "attention": {"model": "performer-tiny", "attention": "performer"},
        "tokenizer": {"model": model, "tokenizer": "bytes"},
        "model": {"model": upload(client, small)},
        "method.targets.0": {"model": model, "method": lora},
    }
    for field, changes in cases.items():
        answer = client.post("/jobs", json=body | changes)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), answer.text
    job = client.post("/jobs", json=body | {"model": model}).json()["id"]
    answer = client.delete(f"/models/{model}")
    assert (answer.status_code, answer.json()["code"], answer.json()["jobs"]) == (409, "model_in_use", [job])
    client.post(f"/jobs/{job}/cancel")
    # Its tokens are still to be made, with the model's tokenizer.
    assert client.delete(f"/models/{model}").json()["datasets"] == [dataset]
    prepare(stage)
    assert client.delete(f"/models/{model}").status_code == 204


def test_a_gguf_is_converted_in_the_background(client: TestClient, stage: Stage) -> None:
    """Here by a program that knows what is in it: the one for real files has tests of its own."""
    model = upload(client, {"tiny.gguf": b"GGUF and so on"})
    answer = client.get(f"/models/{model}").json()
    assert (answer["name"], answer["status"], answer["config"]) == ("tiny", "preparing", None)
    dataset = a_dataset(client)
    refused = client.post("/jobs", json=JOB | {"model": model, "dataset": dataset})
    assert (refused.status_code, refused.json()["code"]) == (409, "model_not_ready")
    assert "GET /models" in refused.json()["hint"]
    prepare(stage, convert="tests.integration.fake_convert")
    answer = client.get(f"/models/{model}").json()
    assert (answer["status"], answer["layout"], answer["tokenizer"]) == ("ready", "llama", "own")
    folder = stage.settings.data_dir / "models" / model
    assert sorted(path.name for path in folder.iterdir()) == ["converted"]
    assert client.post("/plans", json=JOB | {"model": model, "dataset": dataset}).status_code == 200
    assert client.delete(f"/models/{model}").status_code == 204
    assert not folder.exists()


def test_a_gguf_that_is_none_fails_with_a_reason(client: TestClient, stage: Stage) -> None:
    model = upload(client, {"broken.gguf": b"GGUF" + bytes(100)})
    prepare(stage)
    answer = client.get(f"/models/{model}").json()
    assert (answer["status"], answer["error"]["code"]) == ("failed", "model_invalid")
    refused = client.post("/jobs", json=JOB | {"model": model, "dataset": a_dataset(client)})
    assert (refused.status_code, refused.json()["code"]) == (409, "model_not_ready")
    assert refused.json()["hint"] == answer["error"]["hint"]
    assert client.delete(f"/models/{model}").status_code == 204
