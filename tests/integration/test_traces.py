"""Traces, from a request to the phases of the attempts that came of it; and what becomes of everything without them."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

import service
from api.app import create_app
from service import logs, otel, tracing
from service.settings import Settings
from tests.integration.stage import ROOT, Stage, open_stage

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def kept() -> Iterator[InMemorySpanExporter]:
    """The spans that this process makes."""
    exporter = InMemorySpanExporter()
    tracing.use(otel.OpenTelemetry("slimtune-test", SimpleSpanProcessor(exporter)))
    yield exporter
    tracing.stop()


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged, as JSON."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)

    class Lines(list[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return map(json.loads, text.getvalue().splitlines())

    yield Lines()
    root.removeHandler(handler)
    root.setLevel(level)


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def parent_of(span: ReadableSpan) -> str:
    assert span.parent is not None
    return f"{span.parent.span_id:016x}"


def id_of(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def test_a_request_is_part_of_the_trace_that_it_names(
    settings: Settings, kept: InMemorySpanExporter, lines: list[dict[str, Any]]
) -> None:
    settings = settings.model_copy(update={"otel_endpoint": NOWHERE})
    body = {"model": "performer-tiny", "memory_cap": "1GiB", "sequence_length": 64, "steps": 12}
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        client.get("/healthz")
        dataset = client.post("/datasets", files={"file": ("a.txt", b"Hello, world. " * 100)}).json()["id"]
        kept.clear()
        sent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        job_id = client.post("/jobs", json={**body, "dataset": dataset}, headers=sent).json()["id"]
        assert client.get("/jobs/job_0/metrics", headers={"traceparent": "nonsense"}).status_code == 404
        assert client.post("/jobs", json={**body, "dataset": dataset, "memory_cap": "1MiB"}).status_code == 422
        spans = kept.get_finished_spans()
    post, plan, create, commit = (
        next(span for span in spans if span.name == name) for name in ("POST /jobs", "plan", "create job", "commit")
    )
    assert {f"{span.context.trace_id:032x}" for span in (post, plan, create, commit)} == {TRACE}
    assert parent_of(post) == PARENT
    assert [parent_of(span) for span in (plan, create, commit)] == [id_of(post)] * 3
    assert create.attributes is not None
    assert create.attributes["slimtune.job.id"] == job_id
    assert post.attributes is not None
    assert (post.kind.name, post.attributes["http.response.status_code"]) == ("SERVER", 202)
    assert post.attributes["http.route"] == "/jobs"
    missing = next(span for span in spans if span.name == "GET /jobs/{job_id}/metrics")
    assert missing.parent is None
    assert missing.status.is_unset  # the client's mistake, not the server's
    refused = [span for span in spans if span.name == "plan"][1]
    assert not refused.status.is_ok
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "MemoryCapInfeasibleError"
    (access,) = [line for line in lines if line["message"].startswith("POST /jobs 202")]
    assert access["trace_id"] == TRACE


def test_attempts_are_part_of_the_trace_of_their_request_also_after_a_crash(
    stage: Stage, kept: InMemorySpanExporter, lines: list[dict[str, Any]]
) -> None:
    with tracing.span("POST /jobs", parent=f"00-{TRACE}-{PARENT}-01"):
        job_id = stage.create_job(steps=12)
    create = by_name(kept)["POST /jobs"]
    kept.clear()
    assert stage.run(job_id, crash_at=7, crash_attempts=1).status == "queued"
    first = by_name(kept)
    kept.clear()
    assert stage.run(job_id).status == "succeeded"
    second = by_name(kept)
    for found, attempt, status in ((first, 1, "queued"), (second, 2, "succeeded")):
        span = found["attempt"]
        assert span.attributes is not None
        assert (f"{span.context.trace_id:032x}", parent_of(span)) == (TRACE, id_of(create))
        assert (span.attributes["slimtune.job.attempt"], span.attributes["slimtune.job.status"]) == (attempt, status)
        phases = {name for name, child in found.items() if name != "attempt" and parent_of(child) == id_of(span)}
        assert {"start trainer", "load", "probe", "train", "evaluate", "checkpoint"} <= phases
    steps = second["train"].attributes
    assert steps is not None
    assert (steps["slimtune.step.first"], steps["slimtune.step.last"]) == (11, 12)
    written = second["checkpoint"]
    assert written.start_time is not None
    assert written.end_time is not None
    assert written.end_time > written.start_time
    assert second["train"].end_time is not None
    assert second["train"].end_time <= written.start_time
    assert "check gradient" in second
    assert {line["trace_id"] for line in lines if line.get("job_id") == job_id} == {TRACE}


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


def test_a_collector_gets_them_as_protobuf(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("DATABASE_URL", settings.database_url)
        monkeypatch.setenv("REDIS_URL", settings.redis_url)
        monkeypatch.setenv("SLIMTUNE_DATA_DIR", str(settings.data_dir))
        assert tracing.start(Settings(), "slimtune-api")
        with tracing.span("outer", attributes={"a": 1, "nothing": None}), tracing.span("inner"):
            assert tracing.traceparent() is not None
        tracing.stop(10.0)
        assert tracing.traceparent() is None
    (resource,) = [resource for request in received for resource in request.resource_spans]
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "slimtune-api"
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert spans["inner"].parent_span_id == spans["outer"].span_id
    assert [(each.key, each.value.int_value) for each in spans["outer"].attributes] == [("a", 1)]


def test_nobody_waits_for_a_collector(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(otel, "MAX_WAITING", 10)
    began, answer = threading.Event(), threading.Event()
    sent: list[str] = []

    class Hanging(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            began.set()
            assert answer.wait(60)
            sent.extend(span.name for span in spans)
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            """Nothing."""

    tracing.use(otel.OpenTelemetry("slimtune-test", otel.Sender(Hanging(), every_seconds=0.01)))
    with tracing.span("first"):
        pass
    assert began.wait(60)
    for number in range(15):  # while the collector says nothing
        with tracing.span(str(number)):
            pass
    tracing.flush(0.01)
    assert sent == []
    answer.set()
    tracing.stop(60)
    assert sent == ["first", *map(str, range(10))]
    assert "5 spans dropped" in caplog.text


def test_what_is_not_installed_is_said_and_no_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(service, "otel")
    monkeypatch.setitem(sys.modules, "service.otel", None)
    asked = settings.model_copy(update={"otel_endpoint": NOWHERE})
    with TestClient(create_app(asked), base_url="http://127.0.0.1") as client:
        assert client.get("/healthz").status_code == 200
    assert "install slimtune[traces]" in caplog.text


def test_without_an_endpoint_there_is_nothing_of_it(tmp_path: Path) -> None:
    code = """
import sys, api.app, worker.supervisor, worker.attempt
from service import tracing
from service.settings import load_settings
api.app.create_app(load_settings())
with tracing.span("none") as span:
    span.set({"a": 1})
    assert tracing.traceparent() is None
print([name for name in sys.modules if name == "service.otel" or name.startswith("opentelemetry.exporter")])
"""
    environment = {"DATABASE_URL": "postgresql://nowhere/none", "REDIS_URL": "redis://nowhere"}
    environment |= {"SLIMTUNE_DATA_DIR": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
