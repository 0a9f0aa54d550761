"""docker-compose.yml as the compose client itself understands it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.extra


def compose_command() -> list[str]:
    """The client that is installed: the plugin, or the older program of its own."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    pytest.skip("no docker compose client here")


def config(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config`, which needs no engine."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")} | variables
    return subprocess.run(
        [*compose_command(), *options, "config"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_it_is_valid_with_and_without_the_gpu() -> None:
    passwords = {"POSTGRES_PASSWORD": "secret1", "REDIS_PASSWORD": "secret2"}
    plain = config(**passwords)
    assert plain.returncode == 0, plain.stderr
    gpu = config("--profile", "gpu", **passwords)
    assert gpu.returncode == 0, gpu.stderr
    assert "worker-gpu:" in gpu.stdout
    assert "secret1@postgres" in plain.stdout


def test_it_is_valid_with_the_proxy_which_must_know_its_name() -> None:
    files = ("-f", "docker-compose.yml", "-f", "docker-compose.tls.yml")
    passwords = {"POSTGRES_PASSWORD": "secret1", "REDIS_PASSWORD": "secret2", "SLIMTUNE_ACME_EMAIL": "a@example.com"}
    refused = config(*files, **passwords)
    assert "set SLIMTUNE_DOMAIN" in refused.stderr
    found = config(*files, **passwords, SLIMTUNE_DOMAIN="slimtune.example.com")
    assert found.returncode == 0, found.stderr
    assert "caddy:2" in found.stdout


def test_it_is_valid_with_an_object_store() -> None:
    files = ("-f", "docker-compose.yml", "-f", "docker-compose.s3.yml")
    passwords = {"POSTGRES_PASSWORD": "secret1", "REDIS_PASSWORD": "secret2"}
    assert "set SLIMTUNE_STORAGE_URL" in config(*files, **passwords).stderr
    found = config(*files, **passwords, SLIMTUNE_STORAGE_URL="s3://bucket/here")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("missing", ["POSTGRES_PASSWORD", "REDIS_PASSWORD"])
def test_it_refuses_to_start_without_a_password(missing: str) -> None:
    passwords = {"POSTGRES_PASSWORD": "secret1", "REDIS_PASSWORD": "secret2"}
    del passwords[missing]
    refused = config(**passwords)
    assert refused.returncode != 0
    assert f"set {missing}" in refused.stderr
