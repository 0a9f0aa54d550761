"""What API, worker and sweeper write while jobs run and servers go away: who can be found in it, and what cannot."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import IntegrityError

from service import logs
from service.database import transaction
from tests.integration.stage import DatabaseProxy, Stage, open_stage, wait_for

SECRET = "open-sesame"
PATH = "/nothing%0Ahere%ED%A0%80%1B"


@pytest.fixture
def proxied(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[tuple[Stage, DatabaseProxy]]:
    """Processes that reach the database through the proxy, by a URL with a password, and write JSON."""
    sockets = Path(tempfile.mkdtemp(prefix="slimtune-proxy-"))  # not tmp_path: a socket's path may have 107 bytes
    proxy = DatabaseProxy(database_url, sockets)
    with open_stage(database_url, redis_url, tmp_path) as stage:
        url = make_url(proxy.url).set(password=SECRET)
        stage.overrides = {
            "DATABASE_URL": url.render_as_string(hide_password=False),
            "SLIMTUNE_LOG_FORMAT": "json",
            "PYTHONWARNINGS": "ignore",  # Celery has one for root, before it sets up its log
        }
        yield stage, proxy
    proxy.close()
    shutil.rmtree(sockets)


@contextmanager
def api(stage: Stage, **environment: str) -> Iterator[httpx2.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(port)]
    command += ["--http", "api.protocol:LimitedHttp"]
    stage.start("api", command, **environment)
    headers = {"Authorization": f"Bearer {SECRET}", "X-Api-Key": SECRET}
    options: dict[str, Any] = {"headers": headers, "params": {"api_key": SECRET}, "timeout": 30}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", **options) as client:

        def answers() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx2.TransportError:
                return False

        wait_for("an API that answers", answers, 60)
        yield client


def lines(stage: Stage, name: str) -> list[dict[str, Any]]:
    """Every whole line of such processes; each has to be a JSON object."""
    texts = [path.read_text() for path in sorted(stage.logs.glob(f"{name}-*.log"))]
    return [json.loads(line) for text in texts for line in text.split("\n")[:-1]]


def create_job(client: httpx2.Client) -> httpx2.Response:
    dataset = client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 100)}).json()["id"]
    body = {"model": "performer-tiny", "dataset": dataset, "sequence_length": 64, "steps": 3, "memory_cap": "1GiB"}
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return answer


def test_a_request_its_job_and_the_attempts_can_be_followed(proxied: tuple[Stage, DatabaseProxy]) -> None:
    stage, _ = proxied
    with api(stage) as client:
        stage.worker(crash_at=2, crash_attempts=1)
        answer = create_job(client)
        odd = client.get(PATH)
    request_id, job_id = answer.headers["X-Request-ID"], answer.json()["id"]
    assert stage.events(job_id, "queued") == [("queued", {"request_id": request_id})]
    stage.end(job_id, "succeeded", 60)

    of_request = [line for line in lines(stage, "api") if line.get("request_id") == request_id]
    (access,) = [line for line in of_request if line["logger"] == "api.access"]
    assert (access["method"], access["path"], access["status"]) == ("POST", "/jobs", 202)
    assert 0 < access["milliseconds"] < 30_000
    assert f"wake of {job_id} sent" in [line["message"] for line in of_request]
    (access,) = [line for line in lines(stage, "api") if line.get("request_id") == odd.headers["X-Request-ID"]]
    assert access["status"] == 404
    assert access["path"].startswith("/nothing\nhere")

    def of_attempt(attempt: int) -> list[str]:
        mine = {"job_id": job_id, "attempt": attempt}
        return [line["message"] for line in lines(stage, "worker") if mine.items() <= line.items()]

    wait_for("the end of the attempt's lines", lambda: "the attempt ends, the job is succeeded" in of_attempt(2))
    first = of_attempt(1)
    assert first[0] == "the attempt begins"
    assert any(message.startswith("the trainer failed at step 2, trainer_crashed: ") for message in first)
    assert "the attempt ends, the job is queued" in first


def test_no_secret_is_in_any_line_whatever_goes_wrong(proxied: tuple[Stage, DatabaseProxy]) -> None:
    stage, proxy = proxied
    away = f"redis://:{SECRET}@127.0.0.1:1/0"
    with api(stage, REDIS_URL=away) as client:
        stage.start("sweeper", [sys.executable, "-m", "worker.sweeper"], REDIS_URL=away)
        stage.start("sweeper", [sys.executable, "-m", "worker.sweeper"])
        stage.worker(step_seconds=3.0)  # of three steps: it must not be over when the database goes
        command = [sys.executable, "-m", "celery", "--quiet", "-A", "tests.integration.fake_worker", "worker"]
        stage.start("lost-worker", command, REDIS_URL=away)
        job_id = create_job(client).json()["id"]
        stage.reach(job_id, 1, 60)
        proxy.refuse()
        assert client.get("/jobs").status_code == 503
        assert client.get("/readyz").status_code == 503
        wait_for("a sweep that fails", lambda: "not swept" in messages(stage, "sweeper"))
        wait_for("a heartbeat that fails", lambda: "the database does not answer" in messages(stage, "worker"), 60)
        (log,) = stage.logs.glob("lost-worker-*.log")
        wait_for("a worker without a broker", lambda: "Cannot connect" in log.read_text(), 60)
        proxy.answer()
        stage.end(job_id, "succeeded", 60)
    assert "wake of" in messages(stage, "api")
    assert "database unavailable" in messages(stage, "api")
    without_data_dir = ["env", "--unset", "SLIMTUNE_DATA_DIR", sys.executable, "-m", "worker.sweeper"]
    assert stage.start("broken", without_data_dir, REDIS_URL=away).wait(60) == 1
    for log in stage.logs.iterdir():
        assert SECRET not in log.read_text(), log


def messages(stage: Stage, name: str) -> str:
    return "\n".join(line["message"] for line in lines(stage, name))


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_what_a_statement_was_about_is_not_shown(formatter: logging.Formatter, bind: Engine) -> None:
    """Neither the parameters, nor the rows that PostgreSQL names."""
    with pytest.raises(IntegrityError) as caught, transaction(bind) as session:
        statement = text("INSERT INTO idempotency_keys VALUES ('default', :key, 'a', 'b', 'c')")
        for _ in range(2):
            session.execute(statement, {"key": SECRET})
    shown = formatter.format(logging.makeLogRecord({"msg": "refused", "exc_info": caught._excinfo}))
    assert "idempotency_keys_pkey" in shown
    assert SECRET not in shown
