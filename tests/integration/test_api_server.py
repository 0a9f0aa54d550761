"""The API under uvicorn on a real socket: what an in-process client cannot show."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import sqlalchemy

from cli.client import Client
from service import checkpoints
from service.database import transaction
from service.storage import Storage
from tests.integration.seed import add_dataset, add_job, claim

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 48 * 1024**2
EDGE = "edge"
HEAD = f'--{EDGE}\r\nContent-Disposition: form-data; name="file"; filename="big.jsonl"\r\n\r\n'.encode()
TAIL = f"\r\n--{EDGE}--\r\n".encode()
TYPE = f"multipart/form-data; boundary={EDGE}"
LINES_PER_PORTION = 50
LINES = (b'{"text": "' + b"0123456789 " * 300 + b'"}\n') * LINES_PER_PORTION


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "data")


@pytest.fixture
def server(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "SLIMTUNE_DATA_DIR": str(tmp_path / "data"),
        "SLIMTUNE_MAX_UPLOAD_BYTES": str(LIMIT),
    }
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    command += ["--http", "api.protocol:LimitedHttp"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            yield Server(process, port)
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "uvicorn ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("uvicorn does not listen")


def stream(server: Server, portions: Iterator[bytes]) -> tuple[httpx2.Response, int]:
    """The answer to an upload of these portions, and how much of them was sent."""
    sent = 0

    def counted() -> Iterator[bytes]:
        nonlocal sent
        for portion in portions:
            yield portion
            sent += len(portion)

    answer = httpx2.post(f"{server.url}/datasets", content=counted(), headers={"content-type": TYPE}, timeout=60)
    return answer, sent


def files_below(storage: Storage) -> list[str]:
    return [path.name for path in storage.root.rglob("*") if path.is_file()]


def portions_of(count: int) -> Iterator[bytes]:
    yield HEAD
    for _ in range(count):
        yield LINES
    yield TAIL


def test_a_large_upload_takes_no_memory(server: Server, storage: Storage) -> None:
    assert stream(server, portions_of(1))[0].status_code == 201  # what is loaded on first use is loaded now
    before = server.resident_bytes()
    count = LIMIT // len(LINES)
    highest = before

    def watched() -> Iterator[bytes]:
        nonlocal highest
        for portion in portions_of(count):
            yield portion
            highest = max(highest, server.resident_bytes())

    answer, _ = stream(server, watched())
    assert answer.status_code == 201
    assert answer.json()["documents"] == count * LINES_PER_PORTION
    assert highest - before < 16 * 1024**2
    assert sorted(files_below(storage)) == ["data.jsonl", "data.jsonl"]


def test_an_upload_over_the_limit_is_cut_off_while_it_streams(server: Server, storage: Storage) -> None:
    head = f"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: {TYPE}\r\nContent-Length: {2**40}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + HEAD)
        sent = 0
        while not select.select([connection], [], [], 0)[0]:
            connection.sendall(LINES)
            sent += len(LINES)
            assert sent < 2 * LIMIT, "no answer"
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert sent > LIMIT
        assert files_below(storage) == []  # although the upload goes on


def test_an_upload_just_over_the_limit_is_told_so(server: Server, storage: Storage) -> None:
    answer, _ = stream(server, portions_of(LIMIT // len(LINES) + 1))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    assert files_below(storage) == []


def test_a_client_that_goes_away_leaves_nothing(server: Server, storage: Storage) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /datasets HTTP/1.1\r\nHost: [::1]\r\nContent-Type: {TYPE}\r\nContent-Length: 999999999\r\n\r\n"
        connection.sendall(head.encode() + HEAD + LINES * 10)
        _eventually(lambda: len(files_below(storage)) == 1)
    _eventually(lambda: files_below(storage) == [])
    assert httpx2.get(f"{server.url}/datasets").json()["data"] == []


def test_a_fault_is_answered_and_the_server_lives_on(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n" + b"x" * 100)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    answer = httpx2.get(f"{server.url}/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


SUBMISSIONS = 50


@pytest.fixture
def body(server: Server) -> dict[str, Any]:
    files = {"file": ("text.txt", b"Hello, world. " * 100)}
    dataset = httpx2.post(f"{server.url}/datasets", files=files).json()["id"]
    return {"model": "performer-tiny", "dataset": dataset, "memory_cap": "4GiB", "sequence_length": 128, "steps": 10}


def names_of_jobs(server: Server) -> dict[str, str | None]:
    jobs = httpx2.get(f"{server.url}/jobs", params={"limit": 100}).json()["data"]
    return {job["id"]: job["name"] for job in jobs}


def test_fifty_submissions_at_once_make_fifty_jobs(server: Server, body: dict[str, Any]) -> None:
    def submit(name: str) -> str:
        with Client(server.url) as client:
            return client.jobs.create(**{**body, "name": name}).id

    names = [str(number) for number in range(SUBMISSIONS)]
    with ThreadPoolExecutor(SUBMISSIONS) as pool:
        ids = list(pool.map(submit, names))
    assert names_of_jobs(server) == dict(zip(ids, names, strict=True))


def test_fifty_submissions_at_once_with_one_key_make_one_job(server: Server, body: dict[str, Any]) -> None:
    def submit(_: int) -> httpx2.Response:
        return httpx2.post(f"{server.url}/jobs", json=body, headers={"Idempotency-Key": "one"}, timeout=60)

    with ThreadPoolExecutor(SUBMISSIONS) as pool:
        answers = list(pool.map(submit, range(SUBMISSIONS)))
    made = [answer for answer in answers if answer.status_code == 202]
    (job_id,) = names_of_jobs(server)
    assert {answer.json()["id"] for answer in made} == {job_id}
    assert [answer.headers.get("idempotency-replayed") for answer in made].count(None) == 1
    refused = {(answer.status_code, answer.json()["code"]) for answer in answers if answer not in made}
    assert refused <= {(409, "idempotency_key_in_flight")}


FILE_BYTES = 1 << 30


@pytest.fixture
def large_file(database_url: str, storage: Storage) -> Iterator[str]:
    """The path of a file of a gigabyte of a checkpoint. It has holes only: nothing of it is on the disk."""
    bind = sqlalchemy.create_engine(database_url)
    run = claim(bind, add_job(bind, add_dataset(bind, storage).id).id)
    folder = f"{run.checkpoints_dir}/step-00000001"
    storage.path(folder).mkdir(parents=True)
    with storage.path(f"{folder}/model.safetensors").open("wb") as file:
        file.truncate(FILE_BYTES)
    files = [{"name": "model.safetensors", "bytes": FILE_BYTES, "sha256": "0" * 64}]
    with transaction(bind) as session:
        checkpoints.register(session, run.id, run.attempt, 1, files=files, path=folder)
    yield f"/jobs/{run.id}/checkpoints/1/files/model.safetensors"
    bind.dispose()


@contextmanager
def downloading(server: Server, path: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        yield connection


def test_a_large_download_takes_no_memory(server: Server, large_file: str) -> None:
    assert httpx2.head(f"{server.url}{large_file}").headers["content-length"] == str(FILE_BYTES)
    before = highest = server.resident_bytes()
    buffer = bytearray(1 << 20)
    with downloading(server, large_file) as connection:
        received = 0
        while read := connection.recv_into(buffer):
            received += read
            highest = max(highest, server.resident_bytes())
    assert FILE_BYTES < received < FILE_BYTES + 1_000  # with its headers
    assert highest - before < 30e6


def test_a_client_that_reads_nothing_keeps_nobody_waiting_and_frees_the_file_when_it_goes(
    server: Server, large_file: str
) -> None:
    def open_files() -> list[str]:
        return [file.path for file in psutil.Process(server.process.pid).open_files() if "model" in file.path]

    before = server.resident_bytes()
    with ExitStack() as stack:
        for _ in range(45):  # more than there are threads for routes
            stack.enter_context(downloading(server, large_file))
        _eventually(lambda: len(open_files()) == 45, 60)
        assert httpx2.get(f"{server.url}/datasets", timeout=10).status_code == 200
        assert server.resident_bytes() - before < 45 * 4 * 1024**2
    _eventually(lambda: open_files() == [], 30)


def _eventually(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
