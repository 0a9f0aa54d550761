"""A real API process on loopback, its memory, its log, and what it has stored."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
from sqlalchemy import make_url

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


@dataclass(frozen=True)
class LiveApi:
    """uvicorn with the product's own command line."""

    process: subprocess.Popen[bytes]
    port: int
    database_url: str
    data_dir: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def alive(self) -> bool:
        return self.process.poll() is None

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stored(self) -> dict[str, int]:
        """Rows by table, and files and their bytes below the data folder."""
        url = make_url(self.database_url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            tables = connection.execute(
                "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1"
            ).fetchall()
            counts = {}
            for (table,) in tables:
                row = connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()
                assert row is not None
                counts[str(table)] = int(row[0])
        files = [path.stat().st_size for path in self.data_dir.rglob("*") if path.is_file()]
        return {**counts, "files": len(files), "bytes of files": sum(files)}


@contextmanager
def live_api(
    database_url: str, redis_url: str, folder: Path, *options: str, hurry: str | None = None, **environment: str
) -> Iterator[LiveApi]:
    """Started, answering, and stopped again. `options` are uvicorn's; `hurry` is the time limit, in seconds, for heads
    and bodies of requests, in place of the real ones."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data_dir, log = folder / "data", folder / "api.log"
    settings = {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "SLIMTUNE_DATA_DIR": str(data_dir),
        "SLIMTUNE_MAX_UPLOAD_BYTES": str(2**20),
        "PYTHONUNBUFFERED": "1",
    }
    program = ["uvicorn"] if hurry is None else ["tests.fuzz.hurried", hurry]
    command = [sys.executable, "-m", *program, "api.app:create_app", "--factory", "--http", "api.protocol:LimitedHttp"]
    command += ["--port", str(port), *options]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings, **environment}, stdout=output, stderr=output
        ) as process,
    ):
        try:
            _wait_until_it_listens(process, port, log)
            yield LiveApi(process, port, database_url, data_dir, log)
        finally:
            process.terminate()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, log.read_text()[-2_000:]
        assert time.monotonic() < deadline, log.read_text()[-2_000:]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
