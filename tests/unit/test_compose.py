"""docker-compose.yml and Dockerfile, read as text: what holds without a docker engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {"postgres", "redis", "migrate", "api", "sweeper", "webhooks", "worker", "worker-gpu"}
PROGRAMS = ("migrate", "api", "sweeper", "webhooks")
WITHOUT_HEALTH_CHECK = {"migrate", "sweeper", "webhooks"}
"""One ends, the others serve nothing."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


@pytest.fixture(scope="module")
def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile by its name."""
    parts = re.split(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_services_are_there_and_say_how_they_are(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == SERVICES
    assert {name for name in services if "healthcheck" not in services[name]} == WITHOUT_HEALTH_CHECK


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_containers_can_do_little(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" in service or "build" in service  # our own images name theirs, see the test of the Dockerfile


def test_only_the_api_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"api": ["${SLIMTUNE_PUBLISH:-127.0.0.1:8000}:8000"]}
    assert compose["networks"]["backend"] == {"internal": True}


def test_the_api_and_the_sender_of_webhooks_alone_have_a_way_out(compose: dict[str, Any]) -> None:
    out = {name for name, service in compose["services"].items() if "default" in service.get("networks", ["default"])}
    assert out == {"api", "webhooks"}


def test_passwords_have_no_defaults(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in re.findall(r"\$\{(\w*PASSWORD)[^?}]*\}", text):
        pytest.fail(f"{name} is not required")
    for service in compose["services"].values():
        for variable, value in service.get("environment", {}).items():
            if "PASSWORD" in variable or variable.endswith("_URL") or variable == "REDISCLI_AUTH":
                assert re.search(r"\$\{\w+_PASSWORD:\?", value), variable


def test_our_own_processes_log_json(compose: dict[str, Any]) -> None:
    for name in ("api", "sweeper", "webhooks", "worker", "worker-gpu"):
        assert compose["services"][name]["environment"]["SLIMTUNE_LOG_FORMAT"] == "${SLIMTUNE_LOG_FORMAT:-json}"


def test_nothing_starts_before_the_migration(compose: dict[str, Any]) -> None:
    for name in ("api", "sweeper", "webhooks", "worker", "worker-gpu"):
        condition = compose["services"][name]["depends_on"]["migrate"]
        assert condition == {"condition": "service_completed_successfully"}


def test_the_gpu_worker_asks_for_a_gpu_and_only_in_its_profile(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert [name for name in services if "profiles" in services[name]] == ["worker-gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_volumes_are_named_and_declared(compose: dict[str, Any]) -> None:
    used = {mount.split(":")[0] for service in compose["services"].values() for mount in service.get("volumes", ())}
    assert used == set(compose["volumes"])


def test_images_run_as_a_user_and_only_the_worker_has_torch(compose: dict[str, Any], stages: dict[str, str]) -> None:
    assert set(stages) == {"heap", "api", "worker"}
    assert "gcc" in stages["heap"]
    assert "COPY --from=heap" in stages["worker"]
    for text in (stages["api"], stages["worker"]):
        assert "gcc" not in text
        assert re.findall(r"^USER (\w+)$", text, flags=re.MULTILINE)[-1] == "slimtune"
    assert "['dependencies']" in stages["api"]
    assert "train" not in stages["api"]
    assert "['train']" in stages["worker"]
    targets = {name: service["build"]["target"] for name, service in compose["services"].items() if "build" in service}
    assert targets == {
        "migrate": "api",
        "api": "worker",  # for the processes that sample
        "sweeper": "api",
        "webhooks": "api",
        "worker": "worker",
        "worker-gpu": "worker",
    }


def test_what_the_images_need_is_let_into_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {"api", "service", "slim_core", "worker", "migrations"}
    assert packages | {"alembic.ini", "pyproject.toml", "requirements.lock"} <= allowed
    assert not {name for name in allowed if not (ROOT / name).exists()} - {"README.md"}


def test_with_an_object_store_all_that_have_files_reach_it(compose: dict[str, Any]) -> None:
    beside = yaml.safe_load((ROOT / "docker-compose.s3.yml").read_text())["services"]
    with_files = {name for name, service in compose["services"].items() if "data:/data" in service.get("volumes", ())}
    assert set(beside) == with_files - {"migrate", "webhooks"}  # which have the volume, and no use for it
    for service in beside.values():
        assert "default" in service["networks"]
        assert {value for name, value in service["environment"].items() if name.startswith("AWS_")} == {None}
    known = {name.upper() for name in Settings.model_fields} | {
        f"SLIMTUNE_{name.upper()}" for name in Settings.model_fields
    }
    assert set(beside["worker"]["environment"]) <= known


@pytest.fixture(scope="module")
def tls() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.tls.yml").read_text())
    return document


def test_the_proxy_is_all_that_the_second_file_adds(tls: dict[str, Any]) -> None:
    assert set(tls["services"]) == {"api", "proxy"}
    assert tls["services"]["api"] == {"environment": {"FORWARDED_ALLOW_IPS": "*"}}
    proxy = tls["services"]["proxy"]
    assert proxy["read_only"]
    assert (proxy["cap_drop"], proxy["cap_add"]) == (["ALL"], ["NET_BIND_SERVICE"])
    assert proxy["networks"] == ["default"]  # it sees the API, not the database
    named = {mount.split(":")[0] for mount in proxy["volumes"] if not mount.startswith("./")}
    assert named == set(tls["volumes"])
    variables = set(re.findall(r"\{\$(\w+)", (ROOT / "Caddyfile").read_text()))
    assert variables == set(proxy["environment"])
    assert "reverse_proxy api:8000" in (ROOT / "Caddyfile").read_text()


def test_nothing_fills_the_disk_or_the_memory(compose: dict[str, Any], tls: dict[str, Any]) -> None:
    for name, service in {**compose["services"], "proxy": tls["services"]["proxy"]}.items():
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
        if name not in ("worker", "worker-gpu"):  # jobs have caps
            assert service["deploy"]["resources"]["limits"]["memory"], name


def test_what_our_containers_run_is_a_command_of_ours(compose: dict[str, Any], stages: dict[str, str]) -> None:
    commands = [service["command"] for name, service in compose["services"].items() if name in PROGRAMS]
    commands += [
        json.loads(re.findall(r"^CMD (.*)$", text, flags=re.MULTILINE)[-1]) for text in list(stages.values())[1:]
    ]
    assert len(commands) == len(PROGRAMS) + 2
    for command in commands:
        assert command[:3] == ["python", "-m", "cli.main"]
        assert CliRunner().invoke(app, [*command[3:], "--help"]).exit_code == 0, command


def test_what_is_kept_for_how_long_reaches_who_deletes(compose: dict[str, Any]) -> None:
    for name in ("sweeper", "api", "worker"):
        environment = compose["services"][name]["environment"]
        assert {each for each in environment if each.startswith("SLIMTUNE_KEEP_")} == {
            f"SLIMTUNE_{field.upper()}" for field in Settings.model_fields if field.startswith("keep_")
        }
