"""The programs that a service consists of, as command lines. Each runs by the environment alone (docs/operating.md)."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUEUE = "slimtune"


def api(host: str, port: int) -> list[str]:
    """The HTTP API. It ends within seconds, whatever streams are open."""
    where = ["--host", host, "--port", str(port), "--timeout-graceful-shutdown", "5"]
    return _python("uvicorn", "api.app:create_app", "--factory", "--http", "api.protocol:LimitedHttp", *where)


def worker() -> list[str]:
    """What runs jobs. Asked to end, it has a running job write a checkpoint first."""
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"]
    return _python("celery", "--quiet", "-A", "worker.app", "worker", "-Q", QUEUE, *quiet)


def sweeper() -> list[str]:
    """What puts right what crashes left, and deletes what has had its time."""
    return _python("worker.sweeper")


def webhooks() -> list[str]:
    """What tells webhooks."""
    return _python("worker.webhooks")


def migrate(revision: str) -> list[str]:
    """What brings the database's schema up to date, and ends."""
    return _python("alembic", "-c", str(ROOT / "alembic.ini"), "upgrade", revision)


def verify(*options: str) -> list[str]:
    """What compares the database with the files, and ends."""
    return _python("service.verify_program", *options)


def prune(*options: str) -> list[str]:
    """What deletes what has had its time, and ends."""
    return _python("service.prune_program", *options)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
