"""`slimtune up`: it becomes ready, and whatever ends it, nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cli.client import Client

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("home")]


def command(home: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "cli.main", "up", "--home", str(home), *options]


def environment() -> dict[str, str]:
    ours = ("DATABASE_URL", "REDIS_URL", "SLIMTUNE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Running:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.output = ""
        self.url = self._wait_until_ready()
        self.descendants = psutil.Process(process.pid).children(recursive=True)

    def _wait_until_ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # the timeout of the test bounds it
            self.output += line
            if ready := re.search(r"ready: (http://\S+)", line):
                return ready[1]
        pytest.fail(f"not ready:\n{self.output}")

    def wait(self) -> int:
        self.output += self.process.communicate(timeout=60)[0]
        return self.process.returncode

    def named(self, word: str) -> psutil.Process:
        """The first process that has the word in its command line: parents come before their children."""
        return next(child for child in self.descendants if word in " ".join(child.cmdline()))

    def left(self, seconds: float) -> list[psutil.Process]:
        """What still runs after at most that long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(map(alive, self.descendants)):
            time.sleep(0.05)
        return [child for child in self.descendants if alive(child)]


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def up(home: Path) -> Iterator[Running]:
    with subprocess.Popen(
        command(home, "--port", "0"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            running = Running(process)
            yield running
        finally:
            process.kill()  # its children die with it


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
