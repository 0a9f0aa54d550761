"""One trainer per device of a machine: a lock that lives as long as any process of the run does."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_SECONDS = 5.0
"""How long the trainer of a killed supervisor may take to die."""
_POLL_SECONDS = 0.1


@contextmanager
def device_slot(data_dir: Path, *, wait_seconds: float, device: str = "cpu") -> Iterator[int | None]:
    """Hold the slot of `device` on this machine; gives the lock's file descriptor, or None if another run has it.

    The trainer inherits the descriptor. The kernel keeps the lock until every process that has it is gone, so a
    trainer that outlives its supervisor still keeps the next one away. The name carries the machine: the folder may
    be shared between machines, the device is not.
    """
    folder = data_dir / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{device}-{_machine()}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor if _lock(descriptor, wait_seconds) else None
    finally:
        os.close(descriptor)


def _machine() -> str:
    """The same for all containers of one kernel, which share its devices and have host names of their own."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _lock(descriptor: int, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True
