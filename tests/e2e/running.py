"""`slimtune up` as a process of the tests'."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


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
def up(home: Path, **variables: str) -> Iterator[Running]:
    """The service in this folder, on a free port, with these variables of its environment."""
    with subprocess.Popen(
        command(home, "--port", "0"),
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            running = Running(process)
            yield running
        finally:
            process.kill()  # its children die with it
