"""`slimtune keys`: what the operator types, through to what the API then answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from api.app import create_app
from cli.embedded import EmbeddedServers, running_database_url
from cli.main import app
from cli.sizes import parse_bytes
from service.settings import Settings

LIMITS = ["--requests-per-minute", "60", "--max-jobs", "2", "--max-bytes", "50GiB", "--expires-days", "90"]


def test_a_key_is_made_listed_and_revoked(settings: Settings) -> None:
    runner = CliRunner(env={"DATABASE_URL": settings.database_url})
    made = runner.invoke(app, ["keys", "create", "--tenant", "acme", "--name", "my laptop", *LIMITS, "--json"])
    assert made.exit_code == 0, made.output
    key = json.loads(made.stdout)
    assert (key["requests_per_minute"], key["max_jobs"], key["max_bytes"]) == (60, 2, 50 * 2**30)
    headers = {"Authorization": f"Bearer {key['key']}"}
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as client:
        assert client.get("/jobs", headers=headers).status_code == 200
    listed = runner.invoke(app, ["keys", "list"]).stdout
    assert key["id"] in listed
    assert "60 requests/min, 2 jobs, 50.00 GiB" in listed
    assert key["key"] not in listed
    revoked = runner.invoke(app, ["keys", "revoke", key["id"]])
    assert revoked.stdout == f"{key['id']} (my laptop) is revoked\n"
    with TestClient(create_app(settings.model_copy(update={"authentication": "keys"}))) as client:
        assert client.get("/jobs", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["revoke", "key_0"], "There is no key 'key_0'."),
        (["create", "--tenant", "A b", "--name", "x"], "tenant: 'A b'"),
        (["create", "--tenant", "a", "--name", "x", "--expires-days", "0"], "must be above 0"),
        (["list", "--home", "/nowhere", "--database-url", ""], "no database runs in /nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(settings: Settings, arguments: list[str], reason: str) -> None:
    done = CliRunner(env={"DATABASE_URL": settings.database_url}).invoke(app, ["keys", *arguments])
    assert done.exit_code == 1
    assert reason in done.stderr
    assert done.stdout == ""


def test_the_database_of_a_running_service_is_found(servers: EmbeddedServers, tmp_path: Path) -> None:
    assert running_database_url(servers.directory) == servers.database_url
    assert running_database_url(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "count"), [("50GiB", 50 * 2**30), ("1.5 mb", 1_500_000), ("1048576", 2**20), ("7 B", 7)]
)
def test_sizes_as_people_write_them(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "5 apples", "1e9", "9999999TiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|at least"):
        parse_bytes(text)
