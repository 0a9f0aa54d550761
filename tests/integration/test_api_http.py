"""What surrounds the routes: methods, sizes and times of requests."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from api import middleware
from service.settings import Settings
from tests.fuzz.live import LiveApi, live_api
from tests.integration.test_api_problems import check_problem


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/jobs", "GET, POST"),
        ("/jobs/job_1", "DELETE, GET"),
        ("/datasets/ds_1", "DELETE, GET"),
        ("/jobs/job_1/cancel", "POST"),
        ("/jobs/job_1/checkpoints/1/files/a", "GET, HEAD"),
    ],
)
def test_a_wrong_method_hears_of_all_the_right_ones(shared_client: TestClient, path: str, allowed: str) -> None:
    for method in ("TRACE", "PATCH", "PUT", "OPTIONS", "PURGE"):
        answer = shared_client.request(method, path)
        assert (answer.status_code, check_problem(answer)["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == allowed


def test_a_head_over_the_limit_is_refused(shared_client: TestClient) -> None:
    limit = middleware.MAX_HEAD_BYTES
    for answer in (
        shared_client.get("/jobs", headers={"x-flood": "x" * limit}),
        shared_client.get("/jobs?" + "x" * 60_000, headers={"x-flood": "x" * (limit - 60_000)}),
        shared_client.get("/jobs", headers=[(f"x-{number}", "x" * 90) for number in range(limit // 90)]),
    ):
        assert (answer.status_code, check_problem(answer)["code"]) == (431, "head_too_large")
    assert shared_client.get("/jobs", headers={"x-long": "x" * (limit - 1_000)}).status_code == 200


@pytest.fixture(scope="module")
def api(shared_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("live")
    with live_api(shared_settings.database_url, shared_settings.redis_url, folder, hurry="0.5") as running:
        yield running


def everything(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    connection.settimeout(30)
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_who_never_finishes_is_not_waited_for(api: LiveApi) -> None:
    """The limits are the real ones, made short."""
    address = ("127.0.0.1", api.port)
    with socket.create_connection(address) as silent, socket.create_connection(address) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        assert everything(slow).startswith(b"HTTP/1.1 408 ")
        assert everything(silent).startswith(b"HTTP/1.1 408 ")
    for head in (b"POST /jobs", b"POST /jobs/job_1/cancel", b"DELETE /jobs", b"POST /tokenizers", b"POST /datasets"):
        form = b"multipart/form-data; boundary=x" if b"datasets" in head else b"application/json"
        with socket.create_connection(address) as slow:
            slow.sendall(
                head + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: " + form + b"\r\n\r\n-"
            )
            answer = everything(slow)
        assert answer.startswith(b"HTTP/1.1 408 "), head
        assert b'"code": "upload_stalled"' in answer or b'"code": "body_stalled"' in answer


def test_a_head_without_end_takes_no_memory(api: LiveApi) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as flood:
        flood.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
        before, sent = api.resident_bytes(), 0
        try:
            while sent < 256 * 1024**2:
                flood.sendall(b"x" * 65_536)
                sent += 65_536
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 64 * 1024**2
    assert api.resident_bytes() - before < 16 * 1024**2
    assert api.alive()
