"""The client against a real HTTP server that says what the test wants."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

from api import generation, responses, schemas
from cli.client import (
    AuthenticationError,
    Client,
    ConflictError,
    DamagedDownloadError,
    FileRecord,
    InvalidRequestError,
    Job,
    JobCancelledError,
    JobFailedError,
    JobPausedError,
    JobStoppedError,
    MemoryCapInfeasibleError,
    NotFoundError,
    PreparationFailedError,
    RateLimitedError,
    ServiceError,
    UnavailableError,
    WaitTimeoutError,
    answers,
    requests,
)
from cli.main import app
from tests.unit.scripted_service import Script

WEIGHTS = b"weights" * 100_000
FILES = "/jobs/job_1/checkpoints/40/files"
JOB: dict[str, Any] = {"model": "m", "dataset": "ds_1", "memory_cap": "1GiB", "sequence_length": 8, "steps": 1}


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    with Client(script.url, timeout_seconds=5) as client:
        yield client


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, which passes by sleeping."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept each time."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def job(status: str = "running", step: int = 0, **fields: Any) -> dict[str, Any]:
    progress = {"step": step, "total_steps": 9}
    return {"id": "job_1", "name": None, "status": status, "progress": progress, "error": None, **fields}


@pytest.fixture
def existing(client: Client, script: Script) -> Job:
    script.json("/jobs/job_1", job())
    found = client.jobs.get("job_1")
    script.requests.clear()
    return found


def record(content: bytes = WEIGHTS, name: str = "model.safetensors") -> FileRecord:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def serve_weights(script: Script, content: bytes, *files: FileRecord) -> None:
    script.json("/jobs/job_1/checkpoints/final", {"step": 40, "files": files or [record()]})
    script.answers[f"{FILES}/model.safetensors"] = (200, "application/octet-stream", content)


def problem(status: int, code: str, **fields: object) -> tuple[int, str, bytes]:
    return status, "application/problem+json", json.dumps({"code": code, **fields}).encode()


IN_FLIGHT = problem(409, "idempotency_key_in_flight")
UNAVAILABLE = problem(503, "database_unavailable")


def test_it_asks_for_and_reads_what_the_service_has() -> None:
    """Goes red when a field of a request is missing here, or one of an answer there."""
    fields = set(schemas.JobRequest.model_fields)
    assert set(get_type_hints(requests.JobRequest)) == set(get_type_hints(requests.PlanQuestion)) == fields
    asked = set(generation.GenerateRequest.model_fields) - {"prompt", "messages", "stream"}
    assert set(get_type_hints(requests.SampleOptions)) == asked
    for ours, theirs in (
        (answers.JobData, responses.JobResponse),
        (answers.Plan, responses.PlanResponse),
        (answers.Progress, responses.ProgressResponse),
        (answers.JobFailure, responses.JobError),
        (answers.Metric, responses.MetricResponse),
        (answers.Event, responses.EventResponse),
        (answers.Checkpoint, responses.CheckpointResponse),
        (answers.Dataset, responses.DatasetResponse),
        (answers.Tokenization, responses.TokenizationResponse),
        (answers.Tokenizer, responses.TokenizerResponse),
        (answers.Model, responses.ModelResponse),
        (answers.Device, responses.DeviceResponse),
        (answers.Sample, generation.GenerateResponse),
    ):
        assert set(get_type_hints(ours)) <= set(theirs.model_fields), ours


def test_a_download_appears_once_it_is_verified(existing: Job, script: Script, tmp_path: Path) -> None:
    serve_weights(script, WEIGHTS)
    (path,) = existing.download(tmp_path / "new")
    assert path.read_bytes() == WEIGHTS
    assert list((tmp_path / "new").iterdir()) == [path]
    with pytest.raises(ValueError, match=r"no such file: b; there are model\.safetensors"):
        existing.download(tmp_path, files=["b"])


@pytest.mark.parametrize("damaged", [b"x" + WEIGHTS[1:], WEIGHTS[:-1], WEIGHTS + b"x", b""])
def test_a_damaged_download_is_refused_and_not_kept(
    existing: Job, script: Script, tmp_path: Path, damaged: bytes
) -> None:
    serve_weights(script, damaged)
    with pytest.raises(DamagedDownloadError, match=r"model\.safetensors: \d+ bytes"):
        existing.download(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_goes_on_where_it_was(
    existing: Job, script: Script, tmp_path: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_weights(script, WEIGHTS)
    script.truncate = True
    monkeypatch.setattr("cli.client.downloads.TRIES", 1)
    with pytest.raises(UnavailableError, match="broke off"):
        existing.download(tmp_path)
    (partial,) = tmp_path.iterdir()
    there = partial.stat().st_size
    assert 0 < there < len(WEIGHTS)
    arrived: list[int] = []

    def mend(_: float) -> None:
        script.truncate = False

    monkeypatch.setattr("cli.client.downloads.TRIES", 2)
    monkeypatch.setattr(time, "sleep", mend)
    (path,) = existing.download(tmp_path, on_bytes=lambda _, count: arrived.append(count))
    assert path.read_bytes() == WEIGHTS
    assert list(tmp_path.iterdir()) == [path]
    wanted = [headers["Range"] for headers in script.headers[-2:]]
    assert wanted[0] == f"bytes={there}-" != wanted[1]
    assert script.headers[-1]["If-Range"] == f'"{record()["sha256"]}"'
    assert there < arrived[0] <= arrived[-1] == len(WEIGHTS)
    assert arrived == sorted(arrived)


def test_where_the_file_is_another_one_by_now_it_comes_whole(existing: Job, script: Script, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(b"of another checkpoint")
    serve_weights(script, WEIGHTS)
    script.ranges = False
    assert existing.download(tmp_path)[0].read_bytes() == WEIGHTS


def test_what_came_of_another_file_is_forgotten_also_where_the_line_breaks_again(
    existing: Job, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Goes red if the next try goes on from where the earlier file had ended."""
    content = b"weights" * 100  # little enough that none of it is written before the line breaks
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * 200)
    serve_weights(script, content, record(content))
    script.ranges, script.truncate = False, True

    def mend(_: float) -> None:
        script.ranges, script.truncate = True, False

    monkeypatch.setattr(time, "sleep", mend)
    assert existing.download(tmp_path)[0].read_bytes() == content


def test_files_of_a_folder_in_a_checkpoint_keep_it_and_no_name_leads_out(
    existing: Job, script: Script, tmp_path: Path
) -> None:
    content = b"the adapter"
    file = record(content, "adapter/a.bin")
    script.json("/jobs/job_1/checkpoints/final", {"step": 40, "files": [file]})
    script.answers[f"{FILES}/adapter/a.bin"] = (200, "application/octet-stream", content)
    assert existing.download(tmp_path) == [tmp_path / "adapter" / "a.bin"]
    assert (tmp_path / "adapter" / "a.bin").read_bytes() == content
    for name in ("../a.bin", "/a.bin", "a/../../b", ""):
        script.json("/jobs/job_1/checkpoints/final", {"step": 40, "files": [{**file, "name": name}]})
        with pytest.raises(DamagedDownloadError):
            existing.download(tmp_path)


def test_a_problem_becomes_an_error_of_its_kind_with_its_fields(client: Client, script: Script) -> None:
    numbers = {"minimum_cap_bytes": 314_572_800, "max_sequence_length": 394, "suggestions": ["raise it"]}
    script.answers["/jobs"] = problem(422, "memory_cap_infeasible", detail="needs 300 MiB", **numbers)
    with pytest.raises(
        MemoryCapInfeasibleError, match=r"POST /jobs: needs 300 MiB \(memory_cap_infeasible\)"
    ) as refused:
        client.jobs.create(**JOB)
    error = refused.value
    assert (error.status, error.code, error.problem) == (
        422,
        "memory_cap_infeasible",
        json.loads(script.answers["/jobs"][2]),
    )
    assert (error.minimum_cap_bytes, error.max_sequence_length, error.suggestions) == (314_572_800, 394, ["raise it"])
    wrong = [{"field": "steps", "message": "must be positive"}]
    script.answers["/plans"] = problem(422, "invalid_request", errors=wrong)
    with pytest.raises(InvalidRequestError) as invalid:
        client.plans.create(model="m", memory_cap=1, sequence_length=1)
    assert invalid.value.errors == wrong
    for status, kind in (
        (401, AuthenticationError),
        (404, NotFoundError),
        (409, ConflictError),
        (429, RateLimitedError),
    ):
        script.answers["/jobs/job_1"] = problem(status, "code")
        with pytest.raises(kind):
            client.jobs.get("job_1")


def test_an_id_is_one_part_of_a_path(client: Client, script: Script) -> None:
    script.answers["/models/..%2Fjobs%3Fa"] = (204, "text/plain", b"")
    client.models.delete("../jobs?a")
    assert [request for request, _ in script.requests] == ["DELETE /models/..%2Fjobs%3Fa"]


@pytest.mark.parametrize("first", [[], [None], [IN_FLIGHT], [UNAVAILABLE], [None, IN_FLIGHT, UNAVAILABLE]])
def test_a_job_is_asked_for_again_with_the_same_key(
    client: Client, script: Script, naps: list[float], first: list[tuple[int, str, bytes] | None]
) -> None:
    script.first = list(first)
    script.retry_after = "5"
    script.json("/jobs", job(), 202)
    assert client.jobs.create(**JOB).id == "job_1"
    assert script.requests == [("POST /jobs", json.dumps(JOB, separators=(",", ":")).encode())] * (len(first) + 1)
    assert script.keys[0] is not None
    assert set(script.keys) == {script.keys[0]}
    assert [nap >= 5 for nap in naps] == [answer is not None for answer in first]
    client.jobs.create(**JOB)
    assert script.keys[-1] != script.keys[0]


@pytest.mark.parametrize(
    ("answer", "status", "tries"),
    [
        (None, 0, 4),
        (UNAVAILABLE, 503, 4),
        (problem(502, "unknown"), 502, 4),
        (problem(409, "job_state_conflict"), 409, 1),
        (problem(429, "too_many_jobs"), 429, 1),
        (problem(422, "idempotency_key_reused"), 422, 1),
        (problem(500, "internal_error"), 500, 1),
    ],
)
def test_a_job_is_asked_for_a_few_times_and_only_where_that_can_help(
    client: Client, script: Script, naps: list[float], answer: tuple[int, str, bytes] | None, status: int, tries: int
) -> None:
    script.first = [answer] * 9
    with pytest.raises(ServiceError) as refusal:
        client.jobs.create(**JOB)
    assert refusal.value.status == status
    assert len(script.requests) == tries
    for nap, longest in zip(naps, (0.1, 0.4, 1.6), strict=False):
        assert longest / 2 <= nap <= longest


def test_a_turn_is_waited_for_as_the_service_says_and_not_for_ever(
    client: Client, script: Script, clock: list[float]
) -> None:
    script.retry_after = "1"
    script.first = [None, *[IN_FLIGHT] * 20, *[problem(429, "rate_limited")] * 5]
    script.json("/jobs", job(), 202)
    assert client.jobs.create(**JOB, idempotency_key="a key").id == "job_1"
    assert script.keys == ["a key"] * 27
    script.first = [IN_FLIGHT] * 1_000
    start = clock[0]
    with pytest.raises(ConflictError, match="in_flight"):
        client.jobs.create(**JOB)
    assert 55 < clock[0] - start < 62
    script.retry_after = "3600"
    script.first = [UNAVAILABLE, None]
    with pytest.raises(UnavailableError, match="unavailable"):
        client.jobs.get("job_1")


def test_what_may_have_been_done_is_not_asked_for_twice(
    client: Client, existing: Job, script: Script, naps: list[float], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    once = (
        lambda: client.datasets.upload(tmp_path / "a.txt"),
        lambda: client.models.delete("model_1"),
        lambda: client.tokenizers.train("ds_1", 300),
        lambda: existing.resume("1GiB"),
        lambda: existing.generate("x"),
    )
    for act in once:
        script.first = [None] * 9
        script.requests.clear()
        with pytest.raises(UnavailableError):
            act()
        assert len(script.requests) == 1
    for again in (
        existing.resume,
        existing.pause,
        existing.cancel,
        existing.refresh,
        lambda: client.plans.create(**JOB),
    ):
        script.first = [None, None, (200, "application/json", json.dumps(job()).encode())]
        again()
        assert script.first == []


def test_an_upload_that_is_refused_unread_is_sent_again_whole(
    client: Client, script: Script, naps: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "hello"}\n')
    script.first = [problem(429, "rate_limited")]
    script.retry_after = "2"
    script.json("/datasets", {"id": "ds_1"}, 201)
    assert client.datasets.upload(path, name="mine")["id"] == "ds_1"
    assert len(naps) == 1
    assert naps[0] >= 2
    for request, body in script.requests:
        assert request == "POST /datasets"
        assert b'name="file"; filename="data.jsonl"' in body
        assert b'name="name"\r\n\r\nmine' in body
        assert b'{"text": "hello"}' in body


def test_an_error_that_the_service_did_not_make(client: Client, script: Script, naps: list[float]) -> None:
    script.answers["/jobs/job_1"] = (502, "text/html", b"<html>Bad gateway")
    with pytest.raises(UnavailableError, match="GET /jobs/job_1: HTTP 502") as error:
        client.jobs.get("job_1")
    assert error.value.code == "unknown"


@pytest.mark.parametrize(
    ("answer", "location", "says"),
    [
        ((200, "text/html", b"<html>Welcome"), None, "no JSON; is this the address"),
        ((308, "text/html", b""), "https://elsewhere/", "sends to https://elsewhere/; is this the address"),
    ],
)
def test_an_address_where_something_else_answers(
    client: Client, script: Script, answer: tuple[int, str, bytes], location: str | None, says: str
) -> None:
    script.answers["/jobs/job_1"] = script.answers["/readyz"] = answer
    script.location = location
    with pytest.raises(ServiceError, match=says):
        client.jobs.get("job_1")
    script.json("/readyz", ["another service's"])
    assert client.missing() == ["api"]


def test_no_service(naps: list[float]) -> None:
    with Client("http://127.0.0.1:9", timeout_seconds=1) as client:  # the discard port: nobody listens
        assert client.missing() == ["api"]
        with pytest.raises(UnavailableError, match=r"no answer from http://127\.0\.0\.1:9") as error:
            client.tokenizers.train("ds_1", 300)
    assert (error.value.status, error.value.sent, len(naps)) == (0, False, 3)


def test_where_the_service_is_and_who_asks_can_come_from_the_environment(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMTUNE_URL", script.url)
    monkeypatch.setenv("SLIMTUNE_API_KEY", "slim_environment")
    script.json("/jobs/job_1", job())
    for key in (None, "slim_given"):
        with Client(api_key=key) as client:
            client.jobs.get("job_1")
        assert script.headers[-1]["Authorization"] == f"Bearer {key or 'slim_environment'}"


def test_what_is_missing_for_a_job_to_run(client: Client, script: Script) -> None:
    checks = {"database": True, "broker": False, "worker": False}
    script.json("/readyz", {"status": "unavailable", "checks": checks}, 503)
    assert client.missing() == ["broker", "worker"]
    script.json("/readyz", {"status": "ok", "checks": dict.fromkeys(checks, True)})
    assert client.missing() == []


def test_rows_are_read_page_by_page(existing: Job, script: Script) -> None:
    script.json("/jobs/job_1/metrics?after_step=-1&limit=1000", {"data": [{"step": 1}, {"step": 2}], "has_more": True})
    script.json("/jobs/job_1/metrics?after_step=2&limit=1000", {"data": [{"step": 3}], "has_more": False})
    assert [row["step"] for row in existing.metrics()] == [1, 2, 3]


def test_a_model_is_uploaded_with_all_its_files_and_waited_for(
    client: Client, script: Script, naps: list[float], tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("config.json", "model.safetensors")]
    for path in paths:
        path.write_text(f"content of {path.name}")
    script.json("/models", {"id": "model_1", "status": "preparing"}, 201)
    assert client.models.upload(paths, name="mine")["id"] == "model_1"
    ((request, body),) = script.requests
    assert request == "POST /models"
    for path in paths:
        assert f'name="file"; filename="{path.name}"'.encode() in body
        assert path.read_bytes() in body
    preparing = (200, "application/json", json.dumps({"status": "preparing"}).encode())
    script.first = [preparing, preparing]
    script.json("/models/model_1", {"status": "ready"})
    assert client.models.wait("model_1")["status"] == "ready"
    script.json("/models/model_1", {"status": "failed", "error": {"code": "gguf", "message": "no", "hint": "do"}})
    with pytest.raises(PreparationFailedError, match="model_1 failed: gguf: no") as failed:
        client.models.wait("model_1")
    assert failed.value.hint == "do"
    script.answers["/models/model_1"] = preparing
    with pytest.raises(WaitTimeoutError, match="model_1 is preparing after 0 s"):
        client.models.wait("model_1", timeout_seconds=0)
    script.json("/datasets/ds_1", {"tokenizations": [{"tokenizer": "bytes", "status": "ready"}]})
    assert client.datasets.wait("ds_1")["status"] == "ready"
    with pytest.raises(LookupError, match="not tokenized by tok_1"):
        client.datasets.wait("ds_1", "tok_1")


def answer(body: object) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps(body).encode()


def page(*entries: object) -> tuple[int, str, bytes]:
    return answer({"data": entries, "has_more": False})


def rows(*losses: float | None, first: int = 1) -> tuple[int, str, bytes]:
    return page(*({"step": step, "validation_loss": loss} for step, loss in enumerate(losses, first)))


def test_waiting_tells_every_row_and_event_across_a_restart(existing: Job, script: Script, naps: list[float]) -> None:
    """Goes red if a row that came with a lost event is taken for told, or the last look misses the last row."""
    first, second = {"id": 1, "type": "started"}, {"id": 2, "type": "succeeded"}
    script.first = [
        *(answer(job(step=2)), rows(None, None), page(first)),
        *(answer(job(step=3)), rows(2.5, None, first=2), *[None] * 4),  # the service goes away, for its retries too
        *(answer(job("succeeded", step=4)), rows(2.5, None, None, first=2), page(second)),
    ]
    told: list[Any] = []
    events: list[Any] = []
    ended = existing.wait(
        on_metric=lambda row: told.append((row["step"], row["validation_loss"])), on_event=events.append
    )
    assert ended is existing
    assert existing.status == "succeeded"
    assert told == [(1, None), (2, None), (2, 2.5), (3, None), (4, None)]
    assert events == [first, second]
    asked = [request for request, _ in script.requests]
    assert asked[1] == "GET /jobs/job_1/metrics?after_step=-1&limit=1000"
    assert asked[-2:] == [
        "GET /jobs/job_1/metrics?after_step=1&limit=1000",
        "GET /jobs/job_1/events?after=1&limit=1000",
    ]


@pytest.mark.parametrize(
    ("status", "kind"), [("failed", JobFailedError), ("cancelled", JobCancelledError), ("paused", JobPausedError)]
)
def test_waiting_for_a_job_that_does_not_succeed(
    existing: Job, script: Script, status: str, kind: type[JobStoppedError]
) -> None:
    error = {"code": "diverged", "message": "NaN", "step": 7, "hint": "lower it"} if status == "failed" else None
    script.json("/jobs/job_1", job(status, error=error))
    with pytest.raises(kind) as stopped:
        existing.wait()
    assert stopped.value.job is existing
    expected = "job_1 failed: diverged: NaN (lower it)" if error else f"job_1 {status}"
    assert str(stopped.value) == expected
    assert (stopped.value.code, stopped.value.hint) == (("diverged", "lower it") if error else (None, None))


@pytest.mark.parametrize("refusal", [UNAVAILABLE, problem(429, "rate_limited")])
def test_waiting_has_an_end(existing: Job, script: Script, clock: list[float], refusal: tuple[int, str, bytes]) -> None:
    with pytest.raises(WaitTimeoutError, match="job_1 is running after 20 s"):
        existing.wait(timeout_seconds=20, poll_seconds=3)
    assert 20 < clock[0] < 24
    start = clock[0]
    del script.answers["/jobs/job_1"]
    script.first = [refusal] * 10_000
    with pytest.raises((UnavailableError, RateLimitedError)):
        existing.wait(poll_seconds=20)
    assert 290 < clock[0] - start < 330


DONE = {"finish_reason": "stop", "tokens": 3, "prompt_tokens": 1, "seconds": 0.5, "step": 7, "seed": 1}


def stream(*events: tuple[str, object]) -> tuple[int, str, bytes]:
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return 200, "text/event-stream; charset=utf-8", text.encode()


def test_a_sample_comes_in_pieces(existing: Job, script: Script) -> None:
    events = [("token", {"text": "line\n\u2028"}), ("token", {"text": "event: 世"}), ("done", DONE)]
    script.answers["/jobs/job_1/generate"] = stream(*events)
    pieces: list[str] = []
    sample = existing.generate("x", on_text=pieces.append, max_tokens=3)
    assert pieces == ["line\n\u2028", "event: 世"]
    assert sample == {**DONE, "text": "".join(pieces)}
    existing.generate([{"role": "user", "content": "?"}])
    bodies = [json.loads(body) for _, body in script.requests]
    assert bodies[0] == {"prompt": "x", "max_tokens": 3, "stream": True}
    assert bodies[1] == {"messages": [{"role": "user", "content": "?"}], "stream": True}


def test_a_sample_that_fails_or_breaks_off(existing: Job, script: Script, naps: list[float]) -> None:
    path = "/jobs/job_1/generate"
    token = ("token", {"text": "so far"})
    script.answers[path] = stream(token, ("error", {"status": 500, "code": "generate_failed", "detail": "it died"}))
    with pytest.raises(ServiceError, match="it died") as failed:
        existing.generate("x")
    assert (failed.value.status, failed.value.code) == (500, "generate_failed")
    script.answers[path] = stream(token)
    with pytest.raises(UnavailableError, match="broke off"):
        existing.generate("x")
    script.first = [problem(429, "generate_busy")]
    script.retry_after = "5"
    script.answers[path] = stream(token, ("done", DONE))
    assert existing.generate("x")["text"] == "so far"
    assert len(naps) == 1


def test_the_command_prints_the_text_and_beside_it_how_it_ended(script: Script, tmp_path: Path) -> None:
    script.json("/jobs/job_1", job())
    script.answers["/jobs/job_1/generate"] = stream(
        ("token", {"text": "Grü"}), ("token", {"text": "ße"}), ("done", DONE)
    )
    file = tmp_path / "prompt.txt"
    file.write_text("from a file", encoding="utf-8")
    run = functools.partial(CliRunner().invoke, app)
    common = ["generate", "job_1", "--url", script.url]
    for arguments, stdin in (["--prompt", "given"], None), (["--file", str(file)], None), ([], "from stdin"):
        result = run([*common, *arguments, "--checkpoint", "12", "--stop", "a", "--stop", "b"], input=stdin)
        assert (result.exit_code, result.stdout) == (0, "Grüße\n")
        assert result.stderr == "stop: 3 tokens in 0.5 s, step 7, seed 1\n"
    bodies = [json.loads(body) for request, body in script.requests if request.startswith("POST")]
    assert [body.pop("prompt") for body in bodies] == ["given", "from a file", "from stdin"]
    assert bodies == [{"checkpoint": 12, "stop": ["a", "b"], "stream": True}] * 3
    script.answers["/jobs/job_1"] = problem(404, "job_not_found", detail="no")
    assert run([*common, "--prompt", "x"]).exit_code == 1
    assert run([*common, "--prompt", "x", "--file", str(file)]).exit_code == 2


def test_a_quiet_stream_is_not_one_whose_service_is_away(
    existing: Job, script: Script, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats count: what has been quiet for long is asked for again like any other."""
    now = 0.0  # goes on with each look at it, as one does for each line of a stream

    def monotonic() -> float:
        nonlocal now
        now += 10
        return now

    monkeypatch.setattr("cli.client.jobs.time.monotonic", monotonic)
    monkeypatch.setattr("cli.client.jobs.AWAY_SECONDS", 100.0)
    quiet = b'id: 1\nevent: queued\ndata: {"id": 1}\n\n' + b": heartbeat\n\n" * 20
    script.first = [(200, "text/event-stream", quiet), UNAVAILABLE, None, problem(429, "too_many_streams")]
    script.answers["/jobs/job_1/events"] = (200, "text/event-stream", b"id: 1.end\nevent: end\ndata: {}\n\n")
    assert [event["id"] for event in existing.watch()] == [1]
    assert script.headers[-1]["Last-Event-ID"] == "1"
    script.first = [UNAVAILABLE] * 50
    with pytest.raises(UnavailableError, match="unavailable"):
        list(existing.watch())
    assert 30 < len(script.first) < 50
