"""The client against a real HTTP server that says what the test wants."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from cli.answers import FileRecord
from cli.client import Client, DamagedDownloadError, ServiceError
from cli.main import app
from tests.unit.scripted_service import Script

WEIGHTS = b"weights" * 100_000


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    with Client(script.url, timeout_seconds=5) as client:
        yield client


def record(content: bytes = WEIGHTS) -> FileRecord:
    return {"name": "model.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def serve_weights(script: Script, content: bytes) -> None:
    path = "/jobs/job_1/checkpoints/40/files/model.safetensors"
    script.answers[path] = (200, "application/octet-stream", content)


def test_a_download_appears_once_it_is_verified(client: Client, script: Script, tmp_path: Path) -> None:
    serve_weights(script, WEIGHTS)
    path = client.download("job_1", 40, record(), tmp_path)
    assert path.read_bytes() == WEIGHTS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damaged", [b"x" + WEIGHTS[1:], WEIGHTS[:-1], WEIGHTS + b"x", b""])
def test_a_damaged_download_is_refused_and_not_kept(
    client: Client, script: Script, tmp_path: Path, damaged: bytes
) -> None:
    serve_weights(script, damaged)
    with pytest.raises(DamagedDownloadError, match=r"model\.safetensors: \d+ bytes"):
        client.download("job_1", 40, record(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_goes_on_where_it_was(client: Client, script: Script, tmp_path: Path) -> None:
    serve_weights(script, WEIGHTS)
    script.truncate = True
    with pytest.raises(ServiceError, match="broke off"):
        client.download("job_1", 40, record(), tmp_path)
    (partial,) = tmp_path.iterdir()
    there = partial.stat().st_size
    assert 0 < there < len(WEIGHTS)
    script.truncate = False
    arrived: list[int] = []
    path = client.download("job_1", 40, record(), tmp_path, arrived.append)
    assert path.read_bytes() == WEIGHTS
    assert list(tmp_path.iterdir()) == [path]
    assert script.headers[-1]["Range"] == f"bytes={there}-"
    assert script.headers[-1]["If-Range"] == f'"{record()["sha256"]}"'
    assert there < arrived[0] <= arrived[-1] == len(WEIGHTS)


def test_where_the_file_is_another_one_by_now_it_comes_whole(client: Client, script: Script, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(b"of another checkpoint")
    serve_weights(script, WEIGHTS)
    script.ranges = False
    assert client.download("job_1", 40, record(), tmp_path).read_bytes() == WEIGHTS


def test_a_problem_becomes_an_error_with_its_fields(client: Client, script: Script) -> None:
    problem = {"code": "memory_cap_infeasible", "detail": "needs 300 MiB", "minimum_cap_bytes": 314_572_800}
    script.json("/jobs", problem, 422, "application/problem+json")
    with pytest.raises(ServiceError, match=r"POST /jobs: needs 300 MiB \(memory_cap_infeasible\)") as refusal:
        client.create_job({})
    assert (refusal.value.status, refusal.value.code) == (422, "memory_cap_infeasible")
    assert refusal.value.problem["minimum_cap_bytes"] == 314_572_800


def problem(status: int, code: str) -> tuple[int, str, bytes]:
    return status, "application/problem+json", json.dumps({"code": code}).encode()


IN_FLIGHT = problem(409, "idempotency_key_in_flight")
UNAVAILABLE = problem(503, "database_unavailable")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.REPEAT_PAUSES_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr("cli.client.IN_FLIGHT_SECONDS", 0.2)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("first", [[], [None], [IN_FLIGHT], [UNAVAILABLE], [None, IN_FLIGHT, UNAVAILABLE]])
def test_a_job_is_asked_for_again_with_the_same_key(
    client: Client, script: Script, first: list[tuple[int, str, bytes] | None]
) -> None:
    script.first = list(first)
    script.json("/jobs", {"id": "job_1"}, 202)
    assert client.create_job({"steps": 1})["id"] == "job_1"
    assert script.requests == [("POST /jobs", b'{"steps":1}')] * (len(first) + 1)
    assert script.keys[0] is not None
    assert set(script.keys) == {script.keys[0]}
    client.create_job({"steps": 1})
    assert script.keys[-1] != script.keys[0]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("answer", "status", "tries"),
    [
        (None, 0, 4),
        (UNAVAILABLE, 503, 4),
        (problem(502, "unknown"), 502, 4),
        (problem(409, "job_state_conflict"), 409, 1),
        (problem(422, "idempotency_key_reused"), 422, 1),
        (problem(500, "internal_error"), 500, 1),
    ],
)
def test_a_job_is_asked_for_a_few_times_and_only_where_that_can_help(
    client: Client, script: Script, answer: tuple[int, str, bytes] | None, status: int, tries: int
) -> None:
    script.first = [answer] * 9
    with pytest.raises(ServiceError) as refusal:
        client.create_job({})
    assert refusal.value.status == status
    assert len(script.requests) == tries


def test_a_request_that_is_worked_on_is_waited_for(
    client: Client, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.client.REPEAT_PAUSES_SECONDS", (0.0, 0.0, 0.01))
    script.first = [None, *[IN_FLIGHT] * 20]
    script.json("/jobs", {"id": "job_1"}, 202)
    assert client.create_job({}, "a key")["id"] == "job_1"
    assert script.keys == ["a key"] * 22
    monkeypatch.setattr("cli.client.IN_FLIGHT_SECONDS", 0.1)
    script.first = [IN_FLIGHT] * 1_000
    with pytest.raises(ServiceError, match="in_flight"):
        client.create_job({})
    assert len(script.first) > 900


def test_an_error_that_the_service_did_not_make(client: Client, script: Script) -> None:
    script.answers["/jobs/job_1"] = (502, "text/html", b"<html>Bad gateway")
    with pytest.raises(ServiceError, match="GET /jobs/job_1: HTTP 502") as error:
        client.job("job_1")
    assert error.value.code == "unknown"


def test_no_service(script: Script) -> None:
    with Client("http://127.0.0.1:9", timeout_seconds=1) as client:  # the discard port: nobody listens
        assert client.missing() == ["api"]
        with pytest.raises(ServiceError, match=r"no answer from http://127\.0\.0\.1:9") as error:
            client.job("job_1")
    assert error.value.status == 0


def test_what_is_missing_for_a_job_to_run(client: Client, script: Script) -> None:
    checks = {"database": True, "broker": False, "worker": False}
    script.json("/readyz", {"status": "unavailable", "checks": checks}, 503)
    assert client.missing() == ["broker", "worker"]
    script.json("/readyz", {"status": "ok", "checks": dict.fromkeys(checks, True)})
    assert client.missing() == []


def test_rows_are_read_page_by_page(client: Client, script: Script) -> None:
    script.json("/jobs/job_1/metrics?after_step=-1&limit=1000", {"data": [{"step": 1}, {"step": 2}], "has_more": True})
    script.json("/jobs/job_1/metrics?after_step=2&limit=1000", {"data": [{"step": 3}], "has_more": False})
    assert [row["step"] for row in client.metrics("job_1")] == [1, 2, 3]


def test_an_upload_is_multipart_in_the_field_file(client: Client, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "hello"}\n')
    script.json("/datasets", {"id": "ds_1", "bytes": 18, "documents": 1, "tokens": 6}, 201)
    assert client.upload_dataset(path)["id"] == "ds_1"
    ((request, body),) = script.requests
    assert request == "POST /datasets"
    assert b'name="file"; filename="data.jsonl"' in body
    assert b'{"text": "hello"}' in body


def test_a_model_is_uploaded_with_all_its_files(client: Client, script: Script, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("config.json", "model.safetensors")]
    for path in paths:
        path.write_text(f"content of {path.name}")
    script.json("/models", {"id": "model_1", "status": "ready"}, 201)
    assert client.upload_model(paths, name="mine")["id"] == "model_1"
    ((request, body),) = script.requests
    assert request == "POST /models"
    assert b'name="name"\r\n\r\nmine' in body
    for path in paths:
        assert f'name="file"; filename="{path.name}"'.encode() in body
        assert path.read_bytes() in body


def test_files_of_a_folder_in_a_checkpoint_keep_it_and_no_name_leads_out(
    client: Client, script: Script, tmp_path: Path
) -> None:
    content = b"the adapter"
    file: FileRecord = {"name": "adapter/a.bin", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    script.answers["/jobs/job_1/checkpoints/final/files/adapter/a.bin"] = (200, "application/octet-stream", content)
    assert client.download("job_1", "final", file, tmp_path) == tmp_path / "adapter" / "a.bin"
    assert (tmp_path / "adapter" / "a.bin").read_bytes() == content
    for name in ("../a.bin", "/a.bin", "a/../../b", ""):
        with pytest.raises(DamagedDownloadError):
            client.download("job_1", "final", {**file, "name": name}, tmp_path)


DONE = {"finish_reason": "stop", "tokens": 3, "prompt_tokens": 1, "seconds": 0.5, "step": 7, "seed": 1}


def stream(*events: tuple[str, object]) -> tuple[int, str, bytes]:
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return 200, "text/event-stream; charset=utf-8", text.encode()


def test_a_sample_comes_in_pieces(client: Client, script: Script) -> None:
    events = [("token", {"text": "line\n\u2028"}), ("token", {"text": "event: 世"}), ("done", DONE)]
    script.answers["/jobs/job_1/generate"] = stream(*events)
    assert list(client.generate("job_1", {"prompt": "x"})) == ["line\n\u2028", "event: 世", DONE]
    ((request, body),) = script.requests
    assert (request, json.loads(body)) == ("POST /jobs/job_1/generate", {"prompt": "x", "stream": True})


def test_a_sample_that_fails_or_breaks_off(client: Client, script: Script) -> None:
    path = "/jobs/job_1/generate"
    token = ("token", {"text": "so far"})
    script.answers[path] = stream(token, ("error", {"status": 500, "code": "generate_failed", "detail": "it died"}))
    with pytest.raises(ServiceError, match="it died") as failed:
        list(client.generate("job_1", {"prompt": "x"}))
    assert (failed.value.status, failed.value.code) == (500, "generate_failed")
    script.answers[path] = stream(token)
    with pytest.raises(ServiceError, match="broke off"):
        list(client.generate("job_1", {"prompt": "x"}))
    script.json(path, {"status": 429, "code": "generate_busy", "detail": "busy"}, 429, "application/problem+json")
    with pytest.raises(ServiceError, match="busy"):
        list(client.generate("job_1", {"prompt": "x"}))


def test_the_command_prints_the_text_and_beside_it_how_it_ended(script: Script, tmp_path: Path) -> None:
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
    bodies = [json.loads(body) for _, body in script.requests]
    assert [body.pop("prompt") for body in bodies] == ["given", "from a file", "from stdin"]
    assert bodies == [{"checkpoint": 12, "stop": ["a", "b"], "stream": True}] * 3
    script.json("/jobs/job_1/generate", {"code": "job_not_found", "detail": "no"}, 404, "application/problem+json")
    assert run([*common, "--prompt", "x"]).exit_code == 1
    assert run([*common, "--prompt", "x", "--file", str(file)]).exit_code == 2


@pytest.mark.usefixtures("at_once")
def test_a_quiet_stream_is_not_one_whose_service_is_away(
    client: Client, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats count: what has been quiet for long is asked for again like any other."""
    now = 0.0  # goes on with each look at it, and with each line of a stream

    def monotonic() -> float:
        nonlocal now
        now += 10
        return now

    lines = httpx2.Response.iter_lines

    def slowly(response: httpx2.Response) -> Iterator[str]:
        for line in lines(response):
            monotonic()
            yield line

    monkeypatch.setattr("cli.client.time.monotonic", monotonic)
    monkeypatch.setattr(httpx2.Response, "iter_lines", slowly)
    monkeypatch.setattr("cli.client.AWAY_SECONDS", 100.0)
    quiet = b'id: 1\nevent: queued\ndata: {"id": 1}\n\n' + b": heartbeat\n\n" * 20
    script.first = [(200, "text/event-stream", quiet), UNAVAILABLE, None]
    script.answers["/jobs/job_1/events"] = (200, "text/event-stream", b"id: 1.end\nevent: end\ndata: {}\n\n")
    assert [event["id"] for event in client.watch("job_1")] == [1]
    script.first = [UNAVAILABLE] * 50
    with pytest.raises(ServiceError, match="unavailable"):
        list(client.watch("job_1"))
    assert 30 < len(script.first) < 50
