"""OpenAI's own Python client runs a whole fine-tune against the whole service."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from safetensors import safe_open

from tests.e2e.running import up

MODEL = "performer-tiny"
CAP = {"memory_cap": "1GiB"}
POLL_SECONDS = 0.2
TOPICS = ("assert", "assignment", "import", "lambda", "numbers")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("home")]


def lines() -> bytes:
    return b"".join(json.dumps({"text": topics[name]}).encode() + b"\n" for name in TOPICS)


def poll(client: OpenAI, job_id: str, *states: str, **extra: Any) -> FineTuningJob:
    """The job, once it is in one of these states; the timeout of the test bounds it."""
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in states and all((job.model_extra or {})[name] == value for name, value in extra.items()):
            return job
        assert job.status not in {"succeeded", "failed", "cancelled"}, job
        time.sleep(POLL_SECONDS)


def test_a_fine_tune_from_upload_to_weights(home: Path, tmp_path: Path) -> None:
    with up(home) as running, OpenAI(api_key="none", base_url=f"{running.url}/v1") as client:
        path = tmp_path / "train.jsonl"
        path.write_bytes(lines())
        training = client.files.create(file=path, purpose="fine-tune")
        upload = client.uploads.upload_file_chunked(
            file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=10_000
        )
        assert upload.file is not None
        assert client.files.content(upload.file.id).content == path.read_bytes()
        assert client.files.wait_for_processing(training.id, poll_interval=POLL_SECONDS).status == "processed"
        job = client.fine_tuning.jobs.create(
            model=MODEL,
            training_file=training.id,
            validation_file=upload.file.id,
            suffix="topics",
            metadata={"file": training.id},
            extra_body=CAP | {"steps": 6, "sequence_length": 256, "checkpoint_every": 3, "evaluate_every": 3},
        )
        assert [listed.id for listed in client.fine_tuning.jobs.list(metadata={"file": training.id})] == [job.id]
        job = poll(client, job.id, "succeeded")
        look_at_what_it_did(client, job)
        look_at_what_it_left(client, job, tmp_path)
        pause_resume_and_cancel(client, training.id)
        errors_are_openais_own(client, training.id)
        assert job.fine_tuned_model is not None
        assert client.models.delete(job.fine_tuned_model).deleted
        assert client.files.delete(upload.file.id).deleted
        assert upload.file.id not in {file.id for file in client.files.list(limit=1)}


def look_at_what_it_did(client: OpenAI, job: FineTuningJob) -> None:
    assert (job.trained_tokens, job.error, job.hyperparameters.n_epochs) == (6 * 256, None, "auto")
    extra = job.model_extra or {}
    assert 0 < extra["measured_peak_bytes"] <= extra["memory_cap"] == 2**30
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert len(events) > 6
    assert events[0].message == "The job has succeeded"
    assert events[-1].message == "Job created and queued"
    assert len({event.id for event in events}) == len(events)
    metrics = [event.data for event in events if event.type == "metrics"]
    assert all(isinstance(data, dict) and data["loss"] > 0 for data in metrics)
    assert len(metrics) >= 2
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [6, 3]
    for checkpoint in checkpoints:
        assert checkpoint.fine_tuning_job_id == job.id
        assert checkpoint.metrics.train_loss is not None
        assert checkpoint.metrics.valid_loss is not None
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model


def look_at_what_it_left(client: OpenAI, job: FineTuningJob, folder: Path) -> None:
    named = {client.files.retrieve(file_id).filename: file_id for file_id in job.result_files}
    rows = list(csv.DictReader(client.files.content(named["step_metrics.csv"]).text.splitlines()))
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert rows[0]["train_loss"] == ""  # before the first step there is a validation alone
    assert all(float(row["train_loss"]) > 0 for row in rows[1:])
    assert all(float(rows[step]["valid_loss"]) > 0 for step in (0, 3, 6))
    weights = folder / "model.safetensors"
    with client.files.with_streaming_response.content(named["model.safetensors"]) as answer:
        answer.stream_to_file(weights)
    with safe_open(weights, framework="pt") as tensors:
        assert sum(tensors.get_tensor(name).numel() for name in tensors.keys()) > 100_000  # noqa: SIM118
    assert job.fine_tuned_model in {model.id for model in client.models.list()}


def pause_resume_and_cancel(client: OpenAI, file: str) -> None:
    own = CAP | {"steps": 100_000, "sequence_length": 256}
    job_id = client.fine_tuning.jobs.create(model=MODEL, training_file=file, extra_body=own).id
    poll(client, job_id, "running")
    client.fine_tuning.jobs.pause(job_id)
    poll(client, job_id, "queued", paused=True)
    client.fine_tuning.jobs.resume(job_id, extra_body={"memory_cap": "900MiB"})
    poll(client, job_id, "running", memory_cap=900 * 2**20)
    client.fine_tuning.jobs.cancel(job_id)
    assert poll(client, job_id, "cancelled").finished_at is not None


def errors_are_openais_own(client: OpenAI, file: str) -> None:
    ended = client.fine_tuning.jobs.list().data[0].id
    with pytest.raises(openai.BadRequestError) as bad:
        client.files.content(file, extra_headers={"Range": "bytes=none"})
    with pytest.raises(openai.PermissionDeniedError) as denied:
        client.models.list(extra_headers={"Host": "another.example"})
    with pytest.raises(openai.NotFoundError) as missing:
        client.files.retrieve("ds_" + "0" * 32)
    with pytest.raises(openai.ConflictError) as conflict:
        client.fine_tuning.jobs.pause(ended)
    with pytest.raises(openai.UnprocessableEntityError) as impossible:
        client.fine_tuning.jobs.create(model=MODEL, training_file=file, extra_body={"memory_cap": "1MiB"})
    expected = {
        "range_malformed": bad,
        "keys_required": denied,
        "dataset_not_found": missing,
        "job_state_conflict": conflict,
        "memory_cap_infeasible": impossible,
    }
    for code, error in expected.items():
        assert (error.value.code, str(error.value.request_id)[:4]) == (code, "req_")
    assert impossible.value.param == "memory_cap"
