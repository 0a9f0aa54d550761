"""Child processes that end with us: start, stop, and what to say about one that died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIFELINE = Path(__file__).with_name("lifeline.py")


@dataclass(slots=True)
class Child:
    """A process of ours, in a session of its own: Ctrl-C in the terminal reaches only us, who stop things in order."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 10.0
    """How long it may take to stop before it is killed."""

    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask to stop, wait, and kill what does not listen. Does nothing to a process that has ended."""
        if not self.alive():
            return
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End it now."""
        if self.alive():
            self.process.kill()

    def obituary(self, lines: int = 15) -> str:
        """How it ended and the last lines it wrote."""
        code = self.process.poll()
        if code is None:
            how = "is still running"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        tail = log_tail(self.log, lines)
        return f"{self.name} {how}. {self.log}:\n{tail}" if tail else f"{self.name} {how}; {self.log} is empty"


def tethered(
    command: Sequence[str],
    *,
    prefix: Sequence[str] = (),
    user: int | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
) -> list[str]:
    """The command line under which `command` receives `death_signal` if this process dies.

    `prefix` is a command that runs another in a changed environment and then becomes it (`unshare`). `user` is a
    user and group id to run as, which only root can ask for. It has to be started from the main thread: to the
    kernel, a parent is a thread.
    """
    lifeline = [sys.executable, "-I", "-S", str(LIFELINE), str(os.getpid()), str(int(death_signal))]
    return [*prefix, *lifeline, "same" if user is None else str(user), *command]


def spawn(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    directory: Path | None = None,
    stop_signal: signal.Signals = signal.SIGTERM,
    stop_seconds: float = 10.0,
) -> Child:
    """Start a `tethered` command with both outputs appended to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: S603  # modules of ours
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=dict(environment),
            start_new_session=True,
        )
    return Child(name, process, log, stop_signal, stop_seconds)


def log_tail(log: Path, lines: int) -> str:
    """The last `lines` lines of a text file, read from its last 64 KiB; empty if there is no such file."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])
