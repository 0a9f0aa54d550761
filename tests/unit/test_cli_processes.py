"""Child processes: how they stop, and what is said about one that died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cli.processes import LIFELINE, Child, log_tail, spawn, tethered


def start(folder: Path, code: str, stop_seconds: float = 10.0) -> Child:
    """A Python program that has written `ready` to its log."""
    child = spawn(
        "program",
        tethered([sys.executable, "-c", code]),
        log=folder / "program.log",
        environment={"PYTHONUNBUFFERED": "1"},
        stop_seconds=stop_seconds,
    )
    deadline = time.monotonic() + 20
    while "ready" not in log_tail(child.log, 100) and child.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_stops_by_signal(tmp_path: Path) -> None:
    child = start(tmp_path, "import time; print('ready'); time.sleep(600)")
    child.stop()
    assert child.process.returncode == -signal.SIGTERM
    child.stop()  # and again: nothing happens


def test_what_does_not_listen_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(600)"
    child = start(tmp_path, code, stop_seconds=0.2)
    child.stop()
    assert child.process.returncode == -signal.SIGKILL
    assert child.obituary().startswith("program was killed by SIGKILL. ")


def test_says_how_a_program_ended_and_its_last_lines(tmp_path: Path) -> None:
    child = start(tmp_path, "import sys; [print('line', n) for n in range(50)]; print('ready'); sys.exit(3)")
    child.process.wait()
    text = child.obituary(lines=3)
    assert text == f"program ended with exit code 3. {child.log}:\nline 48\nline 49\nready"


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "none", 5) == ""


def test_is_a_session_of_its_own(tmp_path: Path) -> None:
    child = start(tmp_path, "import time; print('ready'); time.sleep(600)")
    assert os.getsid(child.process.pid) == child.process.pid
    child.stop()


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    """The request for the signal would come too late: no signal would ever be sent."""
    command = [sys.executable, "-I", "-S", str(LIFELINE), "1", str(int(signal.SIGKILL)), "same", "echo", "started"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "parent 1 is gone" in done.stderr
