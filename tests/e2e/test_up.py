"""`slimtune up`: it becomes ready, and whatever ends it, nothing is left running."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from cli.client import Client
from tests.e2e.running import ROOT, command, environment, up

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("home")]


@pytest.mark.timeout(900)
def test_is_ready_refuses_a_second_one_and_stops_everything_on_ctrl_c(home: Path) -> None:
    with up(home) as running:
        with Client(running.url) as client:
            assert client.missing() == []
        second = subprocess.run(
            command(home, "--port", "0"), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert f"slimtune already runs in {home} (process {running.process.pid})" in second.stderr
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0
        assert running.left(0.5) == []
        assert running.output.endswith("stopped\n")
    assert {path.name for path in home.iterdir()} - {"demo"} == {"data", "lock", "logs", "servers"}
    logs = {path.stem for path in (home / "logs").glob("*.log")}
    assert logs == {"api", "migration", "postgresql", "redis", "sweeper", "worker"}


@pytest.mark.timeout(900)
def test_a_part_that_dies_is_reported_and_everything_stops(home: Path) -> None:
    with up(home) as running:
        running.named("worker.sweeper").kill()
        assert running.wait() == 1
        assert "error: sweeper was killed by SIGKILL" in running.output
        assert running.left(0.5) == []


@pytest.mark.timeout(900)
def test_kill_9_leaves_nothing_running(home: Path) -> None:
    """Goes red without prctl in cli/lifeline.py."""
    with up(home) as running:
        running.process.kill()
        assert running.left(10) == []


def test_a_port_that_is_taken_is_refused_before_anything_starts(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = subprocess.run(
            command(home, "--port", str(port)), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
    assert refused.returncode == 1
    assert refused.stderr == (
        f"error: cannot listen on 127.0.0.1 port {port}: another program uses it; choose one with --port\n"
    )
    assert "starting" not in refused.stdout
