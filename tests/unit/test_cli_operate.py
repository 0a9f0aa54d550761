"""The operator's commands: which program they become, and with what."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.version import version
from service import version as versions
from tests.unit.scripted_service import Script

ENVIRONMENT = {"DATABASE_URL": "postgresql://db", "REDIS_URL": "redis://broker", "SLIMTUNE_DATA_DIR": "/data"}


class Became(Exception):  # noqa: N818  # no error
    """What execve was asked for."""


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line and environment that a command becomes, or its exit code and output."""

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        assert path == arguments[0] == sys.executable
        raise Became(arguments[1:], environment)

    monkeypatch.setattr(os, "execve", execve)

    def run(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]] | tuple[int, str]:
        result = CliRunner().invoke(app, arguments, env=dict.fromkeys(ENVIRONMENT) | environment)
        if isinstance(result.exception, Became):
            found: tuple[list[str], dict[str, str]] = result.exception.args
            return found
        return result.exit_code, result.output

    return run


@pytest.mark.parametrize("name", ["api", "worker", "sweeper", "webhooks", "migrate", "verify", "prune"])
def test_each_becomes_a_program_that_is_there(become: Any, name: str) -> None:
    command, environment = become(name, **ENVIRONMENT)
    assert command[0] == "-m"
    assert importlib.util.find_spec(command[1]) is not None
    assert environment.items() >= ENVIRONMENT.items()
    assert environment["PATH"] == os.environ["PATH"]


def test_the_api_listens_where_it_decides_about_keys(become: Any) -> None:
    command, environment = become("api", "--host", "::", "--port", "80", **ENVIRONMENT)
    assert command[command.index("--host") + 1] == environment["SLIMTUNE_HOST"] == "::"
    assert command[command.index("--port") + 1] == environment["SLIMTUNE_PORT"] == "80"


def test_what_is_missing_is_wrong_usage(become: Any, tmp_path: Path) -> None:
    code, output = become("worker", DATABASE_URL="postgresql://db")
    assert (code, "REDIS_URL, SLIMTUNE_DATA_DIR must be set" in output) == (2, True)
    assert become("migrate")[0] == 2
    assert become("migrate", "0011", DATABASE_URL="postgresql://db")[0][-2:] == ["upgrade", "0011"]
    assert become("verify", "--home", str(tmp_path))[0] == 2


def test_what_only_looks_finds_the_running_service(become: Any, tmp_path: Path) -> None:
    pid_file = tmp_path / "servers" / "postgresql" / "postmaster.pid"
    pid_file.parent.mkdir(parents=True)
    pid_file.write_text("1\n/data\n0\n5432\n/sockets\n\n")
    command, environment = become("verify", "--hashes", "--json", "--home", str(tmp_path))
    assert command[1:] == ["service.verify_program", "--hashes", "--json"]
    assert environment["DATABASE_URL"].endswith("host=/sockets")
    assert environment["SLIMTUNE_DATA_DIR"] == str(tmp_path / "data")


def test_there_is_one_version_number() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"slimtune {versions.version()}\n"
    assert version() == versions.version()


def test_a_shell_is_told_the_commands(tmp_path: Path) -> None:
    environment = {"_SLIMTUNE_COMPLETE": "complete_bash", "COMP_WORDS": "slimtune wor", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from cli.main import app; app(prog_name='slimtune')"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["worker"]


def test_deleting_asks_first(script: Script) -> None:
    job = "job_01936f0e61b27c1f9f4d0a7be4c2d318"
    script.json(f"/jobs/{job}", {"id": job})
    script.answers[f"/jobs/{job}/checkpoints/7"] = (204, "text/plain", b"")
    asked = CliRunner().invoke(app, ["delete", job, "--url", script.url], input="n\n")
    assert (asked.exit_code, script.requests) == (1, [])
    done = CliRunner().invoke(app, ["delete", job, "--yes", "--checkpoint", "7", "--url", script.url, "--json"])
    assert json.loads(done.stdout) == {"id": job, "deleted": True, "step": 7}
    assert [request for request, _ in script.requests] == [f"GET /jobs/{job}", f"DELETE /jobs/{job}/checkpoints/7"]
