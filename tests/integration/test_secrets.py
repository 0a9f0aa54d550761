"""Secrets stay where they were put: not in a line of any log, at DEBUG either, nor in a row, a file, or a trainer."""

from __future__ import annotations

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
import sqlalchemy as sa
from sqlalchemy import Engine, make_url

from tests.integration.stage import DatabaseProxy, Stage, open_stage, wait_for

DATABASE, BROKER, HEADER, QUERY = "in-the-dsn-71", "in-the-broker-72", "slim_in-the-header-73", "in-the-query-74"
STORE = "of-the-object-store-75"
SECRETS = (DATABASE, BROKER, HEADER, QUERY, STORE)


@pytest.fixture
def proxied(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[tuple[Stage, DatabaseProxy]]:
    sockets = Path(tempfile.mkdtemp(prefix="slimtune-proxy-"))  # not tmp_path: a socket's path may have 107 bytes
    proxy = DatabaseProxy(database_url, sockets)
    with open_stage(database_url, redis_url, tmp_path) as stage:
        url = make_url(proxy.url).set(password=DATABASE)
        stage.overrides = {"DATABASE_URL": url.render_as_string(hide_password=False), "PYTHONWARNINGS": "ignore"}
        stage.overrides |= {"AWS_SECRET_ACCESS_KEY": STORE, "AWS_SESSION_TOKEN": STORE}
        yield stage, proxy
    proxy.close()
    shutil.rmtree(sockets)


@contextmanager
def loud_api(stage: Stage, broker: str) -> Iterator[httpx2.Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stage.start("api", [sys.executable, "-m", "tests.integration.loud_api", str(port)], REDIS_URL=broker)
    headers = {"Authorization": f"Bearer {HEADER}", "X-Api-Key": HEADER, "Cookie": f"session={HEADER}"}
    options: dict[str, Any] = {"headers": headers, "params": {"key": QUERY}, "timeout": 30}
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", **options) as client:

        def answers() -> bool:
            try:
                return client.get("/healthz").status_code == 200
            except httpx2.TransportError:
                return False

        wait_for("an API that answers", answers, 60)
        yield client


def fail_in_every_way(client: httpx2.Client, bind: Engine) -> None:
    """Requests that are wrong, and one that we are."""
    assert client.get("/nothing", params={"after": QUERY}).status_code == 404
    assert client.post("/jobs", content=b"{").status_code == 422
    assert client.post("/datasets", content=b"--", headers={"Content-Type": "multipart/form-data"}).status_code == 422
    with bind.begin() as connection:
        connection.execute(sa.text("ALTER TABLE models RENAME COLUMN kind TO other"))
    assert client.get("/models").status_code == 500
    with bind.begin() as connection:
        connection.execute(sa.text("ALTER TABLE models RENAME COLUMN other TO kind"))


def tables_with(bind: Engine, secret: str) -> list[str]:
    """The tables that have it in some column of some row."""
    with bind.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        query = 'SELECT count(*) FROM "{}" t WHERE t::text LIKE :part'
        return [table for table in tables if connection.scalar(sa.text(query.format(table)), {"part": f"%{secret}%"})]


def test_no_secret_gets_anywhere(proxied: tuple[Stage, DatabaseProxy]) -> None:
    stage, proxy = proxied
    broker = f"redis://:{BROKER}@127.0.0.1:1/0"
    with loud_api(stage, broker) as client:
        fail_in_every_way(client, stage.bind)
        dataset = client.post("/datasets", files={"file": ("text.txt", b"Hello, world. " * 100)}).json()["id"]
        body = {"model": "performer-tiny", "dataset": dataset, "sequence_length": 64, "steps": 3, "memory_cap": "1GiB"}
        job_id = client.post("/jobs", json=body).json()["id"]
        celery = [sys.executable, "-m", "celery", "--quiet", "-A", "tests.integration.fake_worker", "worker"]
        stage.start("lost-worker", [*celery, "--loglevel=DEBUG"], REDIS_URL=broker)
        stage.start("sweeper", [sys.executable, "-m", "worker.sweeper"], REDIS_URL=broker)
        stage.start("sweeper", [sys.executable, "-m", "worker.sweeper"])
        options = {"FAKE_TRAINER_OPTIONS": '{"step_seconds": 3.0}', "SECRET_OF_THE_WORKER": HEADER}
        stage.start("worker", [*celery, "--loglevel=DEBUG", "--without-mingle", "--without-gossip"], **options)
        stage.reach(job_id, 1, 60)
        process = Path("/proc", str(stage.trainer_pid(job_id)))
        trainer = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        proxy.refuse()
        assert client.get("/jobs").status_code == 503
        (log,) = stage.logs.glob("lost-worker-*.log")
        wait_for("a worker without a broker", lambda: "Cannot connect" in log.read_text(), 60)
        proxy.answer()
        stage.end(job_id, "succeeded", 60)
    assert b"PATH=" in trainer
    texts = {
        path: path.read_bytes()
        for folder in (stage.logs, stage.settings.data_dir)
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert any(b" DEBUG " in text for path, text in texts.items() if path.name.startswith("api-"))
    for secret in SECRETS:
        assert secret.encode() not in trainer
        assert [path for path, text in texts.items() if secret.encode() in text] == []
        assert tables_with(stage.bind, secret) == []
