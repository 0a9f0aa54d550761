"""The handle on a trainer process: its lifeline, its report pipe, its end. Knows no job and no database."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worker.messages import ProtocolError

REPORT_FD = "SLIMTUNE_REPORT_FD"
_MAX_LINE_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the child gets SIGKILL when the thread that started it ends, however that happens.

    The trainer asks for the same by itself, but only once its interpreter runs; this closes the time before. What it
    starts stays its descendant even when a process between them ends: the memory of all of them counts.
    """
    parent = os.getpid()

    def in_child() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if os.getppid() != parent:  # it ended between the fork and the call above
            os._exit(1)

    return in_child


class TrainerProcess:
    """One trainer in its own session. Ends with the supervisor: end of file on its stdin, and PR_SET_PDEATHSIG.

    `inherit` are file descriptors it holds as long as it lives (the device lock). stderr goes to `stderr_path`.
    """

    def __init__(
        self,
        command: Sequence[str],
        spec: dict[str, Any],
        environment: dict[str, str],
        stderr_path: Path,
        inherit: Sequence[int] = (),
    ) -> None:
        self._report_fd, child_end = os.pipe()
        self._buffer = bytearray()
        os.set_blocking(self._report_fd, False)
        try:
            with stderr_path.open("wb") as stderr:
                self._process = subprocess.Popen(  # noqa: S603  # the trainer's command, which the worker makes
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=stderr,
                    stderr=stderr,
                    env={**environment, REPORT_FD: str(child_end)},
                    pass_fds=(child_end, *inherit),
                    start_new_session=True,
                    preexec_fn=die_with_parent(),  # noqa: PLW1509  # system calls only, no lock that a thread could hold
                )
        except BaseException:
            os.close(self._report_fd)
            raise
        finally:
            os.close(child_end)
        self.pid = self._process.pid
        self._lifeline = self._process.stdin
        self._send(json.dumps(spec).encode() + b"\n")

    def _send(self, data: bytes) -> None:
        # One that died at once has closed the pipe; its exit status will say why.
        if self._lifeline is not None:
            with contextlib.suppress(BrokenPipeError):
                self._lifeline.write(data)
                self._lifeline.flush()

    def read_lines(self, timeout_seconds: float) -> list[bytes]:
        """The whole lines that have arrived, after at most `timeout_seconds`; at most 64 KiB a call.

        A last line without its end is never returned: its writer died in the middle. Raises ProtocolError when
        a line grows past 1 MiB. Returns at once when the pipe is at its end; `running` tells that apart.
        """
        if self._report_fd < 0:
            time.sleep(timeout_seconds)
            return []
        if not select.select([self._report_fd], [], [], timeout_seconds)[0]:
            return []
        data = os.read(self._report_fd, _READ_BYTES)
        if not data:
            os.close(self._report_fd)
            self._report_fd = -1
            return []
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise ProtocolError(f"a line of more than {_MAX_LINE_BYTES} bytes")
        self._buffer = bytearray(rest)
        return lines

    @property
    def running(self) -> bool:
        """Whether the process is there. It is not reaped here, so that its group id cannot be taken by another."""
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return status is None

    @property
    def drained(self) -> bool:
        """Whether nothing more can arrive: the pipe is at its end, or the process is gone and the pipe is empty."""
        if self._report_fd < 0:
            return True
        return not self.running and not select.select([self._report_fd], [], [], 0)[0]

    def terminate(self) -> None:
        """Ask for a checkpoint and an orderly end (SIGTERM)."""
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the trainer and everything it started."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> int:
        """End whatever is left of the process group, close the pipes, and give the exit status (-N: signal N)."""
        status = self._process.returncode
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            status = self._process.wait()
        if self._lifeline is not None:
            with contextlib.suppress(BrokenPipeError):
                self._lifeline.close()
        if self._report_fd >= 0:
            os.close(self._report_fd)
            self._report_fd = -1
        return status


def tail(path: Path, lines: int = 20, limit_bytes: int = 8192) -> list[str]:
    """The last `lines` lines of a log, from its last `limit_bytes` bytes; empty when there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            return file.read(limit_bytes).decode("utf-8", "replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []
