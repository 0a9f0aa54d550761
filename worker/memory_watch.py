"""The supervisor's own look at what a trainer and everything that it started hold.

A trainer limits and measures itself (slim_core/memory.py). This is for one that does not, and for its children, which
no limit of one process bounds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

READING_EXCESS_BYTES = 8 << 20
"""A CPU reading may exceed the truth by this much, in a step that maps pages of a library for the first time."""
CHECK_SECONDS = 0.1
_READINGS_OF_A_LIST = 10
_BLOCK_BYTES = 1 << 14


class ProcessTree:
    """A process and its descendants. Orphans count as long as the process is a subreaper (worker/process.py)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._members = {pid}
        self._newest: bytes | None = None
        self._readings = 0

    def private_bytes(self) -> int:
        """Private resident memory (RssAnon) of all of them now; 0 once they are gone."""
        # All of /proc is read (9 µs a process) only when a process was started since: loadavg's last field names it.
        # A process that was being forked then is not there yet, so once a second all the same.
        newest = _read("/proc/loadavg").rpartition(b" ")[2]
        self._readings += 1
        if newest != self._newest or self._readings % _READINGS_OF_A_LIST == 0:
            self._newest = newest
            self._members = descendants(self._pid)
        return sum(map(private_bytes, self._members))

    def kill(self) -> None:
        """SIGKILL to every process of it that was there at the last reading."""
        for pid in self._members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class MemoryWatch(AbstractContextManager["MemoryWatch"]):
    """Kills a trainer and all that it started when they hold more than its cap and the error of a reading. A thread, so
    that no slow database delays it. The trainer must not be reaped inside the block: its id would be free for another.
    """

    def __init__(self, pid: int, cap_bytes: int) -> None:
        self._tree = ProcessTree(pid)
        self._cap_bytes = cap_bytes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self.exceeded_bytes: int | None = None
        """What was held when that was too much."""

    def stop(self) -> None:
        """Watch no longer: the cap is one of another memory."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(CHECK_SECONDS):
            held = self._tree.private_bytes()
            if held > self._cap_bytes + READING_EXCESS_BYTES:
                self.exceeded_bytes = held
                self._tree.kill()
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()


def private_bytes(pid: int) -> int:
    """Private resident memory (RssAnon of proc_pid_status(5)) of a process now; 0 if it is gone."""
    _, found, rest = _read(f"/proc/{pid}/status").partition(b"RssAnon:")
    return int(rest.split(None, 1)[0]) * 1024 if found else 0  # a zombie has no such line


def descendants(root: int) -> set[int]:
    """`root` and all processes that descend from it."""
    children: dict[int, list[int]] = {}
    with os.scandir("/proc") as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for pid in pids:
        if stat := _read(f"/proc/{pid}/stat"):
            parent = int(stat.rpartition(b")")[2].split(None, 2)[1])  # the name in brackets may hold anything
            children.setdefault(parent, []).append(pid)
    members = {root}
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            members.add(child)
            waiting.append(child)
    return members


def _read(path: str) -> bytes:
    """The beginning of a file in /proc; empty if its process is gone, or somebody else's where these are hidden."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return b""
    try:
        return os.read(descriptor, _BLOCK_BYTES)
    except ProcessLookupError:  # it ended between the two calls
        return b""
    finally:
        os.close(descriptor)
