"""Where faults are inflicted: real servers, stages on databases of their own, and a seed."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cli.embedded import EmbeddedServers
from tests.chaos import guards
from tests.integration.stage import ROOT, Stage, open_stage

_numbers = itertools.count(1)


@dataclass
class Arena:
    """Servers that are shared, a folder, and the randomness of one fault."""

    servers: EmbeddedServers
    template: str
    """A migrated database to copy."""
    folder: Path
    seed: int
    guard: str | None = None
    """One that is removed, so that the oracle must find a violation."""
    patience_seconds: float = 90.0
    """For what takes a second or two on a machine that does nothing else."""
    slack: float = 1.0
    """Times the seconds that an answer may take: more where other tests have the machine too."""
    recoveries: list[float] = field(default_factory=list)
    """Seconds from each fault until the job went on: what a user would have waited."""
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311  # of a test, to be repeated

    @contextmanager
    def stage(self, **settings: Any) -> Iterator[Stage]:
        """A stage on the shared servers, with a database of its own and an empty broker."""
        name = f"chaos_{next(_numbers)}"
        with self.servers.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {self.template}")
        try:
            with self._stage(self.servers.database_url_of(name), self.servers.redis_url, settings) as stage:
                stage.redis.flushall()
                yield stage
        finally:
            with self.servers.connect() as connection:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def fragile_stage(self, **settings: Any) -> Iterator[tuple[Stage, FragileServers]]:
        """A stage on servers of its own, which can be killed and started again: PostgreSQL keeps what it committed."""
        with self.scratch() as folder, FragileServers(folder) as servers:
            migrate(servers.postgres.database_url)
            with self._stage(servers.postgres.database_url, servers.redis.redis_url, settings) as stage:
                yield stage, servers

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder on a disk, that other users may pass through."""
        folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=self.folder))
        folder.chmod(0o711)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    @contextmanager
    def _stage(self, database_url: str, redis_url: str, settings: dict[str, Any]) -> Iterator[Stage]:
        with (
            self.scratch() as folder,
            guards.without(self.guard),
            open_stage(database_url, redis_url, folder, **settings) as stage,
        ):
            if self.guard is not None:
                stage.overrides[guards.VARIABLE] = self.guard
            yield stage


class FragileServers(AbstractContextManager["FragileServers"]):
    """PostgreSQL and Redis, each by itself. Start and kill from the main thread."""

    def __init__(self, folder: Path) -> None:
        self.postgres = EmbeddedServers(folder / "p", redis=False)
        self.redis = EmbeddedServers(folder / "r", postgres=False)

    def __enter__(self) -> Self:
        self.postgres.start()
        self.redis.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.redis.stop()
        self.postgres.stop()

    @staticmethod
    def kill(server: EmbeddedServers) -> None:
        """SIGKILL; `start` brings it back, under the same URL."""
        for child in server.children:
            child.kill()
            child.process.wait()
        server.stop()  # what is left: the sockets


def migrate(database_url: str) -> None:
    """Bring a database to the newest version."""
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    environment = {"PATH": "/usr/bin:/bin", "DATABASE_URL": database_url}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
