"""Slots of a device: locks that live as long as any process of a run does, with what the run may hold written in them.

The trainer inherits the lock. The kernel keeps it until every process that has it is gone, so a trainer that outlives
its supervisor, and whose job the database has given to another attempt, still counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

WAIT_SECONDS = 5.0
"""How long the trainer of a killed supervisor may take to die."""
_POLL_SECONDS = 0.1


def device_id(kind: str) -> str:
    """The name of this machine's device of a kind: the same for all containers of one kernel, which share its devices
    and have host names of their own.
    """
    return f"{kind}-{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def locks_dir(data_dir: Path) -> Path:
    """Where the locks lie."""
    return data_dir / "locks"


class Slot:
    """A slot that this process holds."""

    def __init__(self, descriptor: int, path: Path, device: str) -> None:
        self.descriptor = descriptor
        """Of the lock, for the trainer to inherit."""
        self._path = path
        self._device = device

    def note(self, job_id: str, attempt: int, memory_cap_bytes: int) -> None:
        """Write down what runs here, for `others` of the next claims. Call before the claim is committed."""
        text = json.dumps({"job_id": job_id, "attempt": attempt, "memory_cap_bytes": memory_cap_bytes})
        os.pwrite(self.descriptor, text.encode(), 0)

    def others(self) -> dict[tuple[str, int], int]:
        """Caps in bytes by job id and attempt of what holds this machine's other slots of the device.

        Call while the device's row is locked: nobody else writes then.
        """
        held = {}
        for path in sorted(self._path.parent.glob(f"{self._device}.*.lock")):
            if path != self._path and (text := _content_if_locked(path)):
                entry = json.loads(text)
                held[entry["job_id"], entry["attempt"]] = int(entry["memory_cap_bytes"])
        return held


@contextmanager
def device_slot(data_dir: Path, device: str, *, slots: int, wait_seconds: float) -> Iterator[Slot | None]:
    """Hold one of the `slots` slots of `device`; None if other runs have all of them.

    `device` is from `device_id`: the folder may be shared between machines, the device is not.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        for index in range(slots):
            with _locked(data_dir, device, index) as slot:
                if slot is not None:
                    yield slot
                    return
        if time.monotonic() >= deadline:
            yield None
            return
        time.sleep(_POLL_SECONDS)


@contextmanager
def whole_device(data_dir: Path, device: str, *, slots: int) -> Iterator[bool]:
    """Hold every slot of `device`; whether that was possible."""
    with ExitStack() as stack:
        yield all(stack.enter_context(_locked(data_dir, device, index)) is not None for index in range(slots))


@contextmanager
def _locked(data_dir: Path, device: str, index: int) -> Iterator[Slot | None]:
    folder = locks_dir(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device}.{index}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            os.ftruncate(descriptor, 0)  # what an earlier run had written
            yield Slot(descriptor, path, device)
    finally:
        os.close(descriptor)


def _content_if_locked(path: Path) -> bytes:
    with path.open("rb") as file:
        try:
            # Shared, so that two that look do not see each other; one that wants the slot at this moment tries again.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read()
        return b""
