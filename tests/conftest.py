"""Real servers for the tests: one PostgreSQL and one Redis per test process, one fresh database per test."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import sqlalchemy

from cli.embedded import EmbeddedServers
from service import calibrations
from service.database import transaction
from service.settings import Settings
from slim_core.planning import Calibration
from worker import calibrator

# Tests run side by side. Threads of torch that spin while they wait would take the cores from each other; the library
# reads this when it loads, and trainers inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = "slimtune_template"
SCRATCH = "slimtune-tests-"

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory for servers' data, which pytest's own would keep for three more runs.

    In memory if there is room: a fresh database then takes 10 ms instead of 300. PostgreSQL may run as another user
    than root, who has to be let through.
    """
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**30
    parent = memory if roomy else Path(tempfile.gettempdir())
    for leftover in parent.glob(f"{SCRATCH}*"):  # of runs that were killed
        pid = leftover.name.removeprefix(SCRATCH)
        if leftover.stat().st_uid == os.geteuid() and not Path("/proc", pid).exists():
            shutil.rmtree(leftover)
    directory = parent / f"{SCRATCH}{os.getpid()}"
    directory.mkdir(mode=0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def servers(scratch: Path) -> Iterator[EmbeddedServers]:
    """PostgreSQL and Redis, started by the first test that needs them."""
    with EmbeddedServers(scratch / "servers", durable=False) as running:
        yield running


@pytest.fixture(scope="session")
def template_database(servers: EmbeddedServers) -> str:
    """A database with every migration applied, to be copied."""
    with servers.connect() as connection:
        connection.execute(f"CREATE DATABASE {TEMPLATE}")
    _migrate(servers.database_url_of(TEMPLATE))
    return TEMPLATE


@pytest.fixture
def empty_database_url(servers: EmbeddedServers) -> Iterator[str]:
    """The URL of a database without tables, dropped after the test: for tests of the migrations themselves."""
    yield from _database(servers, "template1")


@pytest.fixture
def database_url(servers: EmbeddedServers, template_database: str) -> Iterator[str]:
    """The SQLAlchemy URL of a migrated database of this test alone, dropped after it."""
    yield from _database(servers, template_database)


@pytest.fixture
def redis_url(servers: EmbeddedServers) -> str:
    """The broker URL of a Redis that holds nothing."""
    with redis.Redis(unix_socket_path=str(servers.redis_socket)) as client:
        client.flushall()
    return servers.redis_url


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Of this machine, measured as a worker does it, once for all test processes: it takes a minute or two."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all of them share
    settings = Settings(database_url="postgresql:///none", redis_url="redis:///none", data_dir=folder)
    path = folder / "calibration.json"
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if text := file.read():
            return Calibration.from_json(json.loads(text))
        measured = calibrator.measured_now(settings)
        file.write(json.dumps(measured.to_json()))
    return measured


@pytest.fixture(scope="session")
def calibrated(calibration: Calibration) -> Callable[[Path], None]:
    """Makes the folder of a service whose worker, when it starts there, knows its machine already."""

    def prepare(home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        with EmbeddedServers(home / "servers", log_directory=home / "logs", redis=False) as servers:
            _migrate(servers.database_url)
            bind = sqlalchemy.create_engine(servers.database_url)
            with transaction(bind) as session:
                calibrations.store(session, calibration.device, "tests", calibration.to_json())
            bind.dispose()

    return prepare


def _database(servers: EmbeddedServers, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with servers.connect() as connection:
        # Without fsync, copying files is faster than the default strategy of writing pages to the log.
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    yield servers.database_url_of(name)
    with servers.connect() as connection:
        # By force: what a test left connected must not fail the next one.
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _migrate(url: str) -> None:
    migration = subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert migration.returncode == 0, migration.stdout
