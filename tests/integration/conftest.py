"""An API and its parts on the servers of tests/conftest.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from api.app import create_app
from cli.embedded import EmbeddedServers
from service import database
from service.models import Job
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_dataset, add_job

_numbers = itertools.count(1)


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, data_dir=tmp_path / "data", max_upload_bytes=2**20)


@pytest.fixture
def bind(settings: Settings) -> Iterator[Engine]:
    engine = database.engine(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return Storage(settings.data_dir)


@pytest.fixture
def job(bind: Engine, storage: Storage) -> Job:
    return add_job(bind, add_dataset(bind, storage).id)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as running:
        yield running


@pytest.fixture(scope="module")
def shared_settings(
    servers: EmbeddedServers, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """For tests that can share a database with the others of their module: it has cost most of their time."""
    name = f"shared_{next(_numbers)}"
    with servers.connect() as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template_database}")
    yield Settings(
        database_url=servers.database_url_of(name),
        redis_url=servers.redis_url,
        data_dir=tmp_path_factory.mktemp("shared"),
        max_upload_bytes=2**20,
    )
    with servers.connect() as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def shared_client(shared_settings: Settings) -> Iterator[TestClient]:
    """For requests that leave nothing behind."""
    with TestClient(create_app(shared_settings), base_url="http://127.0.0.1") as running:
        yield running
