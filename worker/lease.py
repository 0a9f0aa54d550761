"""How long a run may go on without hearing from the database, by a clock that also counts suspend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self


def now() -> float:
    """Seconds on a clock that never jumps and goes on while the machine sleeps or the process is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseLostError(Exception):
    """The database has not renewed the lease for too long: another attempt may be about to start."""


class Lease:
    """When the lease was last renewed, and what follows from it."""

    def __init__(self, self_kill_seconds: float) -> None:
        self._self_kill_seconds = self_kill_seconds
        self.renewed_at = now()

    def renewed(self, at: float) -> None:
        """The database renewed the lease in a transaction that began at `at`, a value of `now()`."""
        self.renewed_at = at

    @property
    def age_seconds(self) -> float:
        return now() - self.renewed_at

    @property
    def lost(self) -> bool:
        """Whether the run has to end: another attempt may be about to start."""
        return self.age_seconds > self._self_kill_seconds


class Watchdog(AbstractContextManager["Watchdog"]):
    """Kills the trainer of a lost lease even while the supervisor's loop hangs in a call to the database.

    A thread, because a database that accepts and never answers can hold the loop for longer than the lease.
    """

    def __init__(self, lease: Lease, kill: Callable[[], None], check_seconds: float = 0.5) -> None:
        self._lease = lease
        self._kill = kill
        self._check_seconds = check_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease-watchdog", daemon=True)

    def _watch(self) -> None:
        while not self._stopped.wait(self._check_seconds):
            if self._lease.lost:
                self._kill()
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
