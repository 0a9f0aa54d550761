"""What `slimtune up` says while it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli import up
from cli.up import Options, Stack
from tests.unit.scripted_service import Script


def test_what_is_late_is_named_once_with_its_log(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "LATE_SECONDS", -1.0)
    monkeypatch.setattr("cli.up.time.sleep", lambda _: None)
    waiting = [{"storage": False, "worker": False}, {"storage": False, "worker": False}, {"worker": False}]
    script.first = [(503, "application/json", json.dumps({"checks": checks}).encode()) for checks in waiting]
    script.json("/readyz", {"checks": {"worker": True}})
    said: list[str] = []
    Stack(Options(tmp_path, port=int(script.url.rpartition(":")[2])), said.append)._wait_until_ready()
    assert said == [f"still waiting for storage; {tmp_path / 'logs' / 'api.log'} says why"]
