"""The device of this worker: what it is, how much of it jobs may hold, and the announcement of both."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import devices
from service.database import transaction
from service.devices import Announcement
from service.settings import Settings
from worker.environment import trainer_environment
from worker.process import die_with_parent
from worker.slot import device_id

SHARE = 0.8
"""Of the memory, for jobs. The rest is for the system, its file cache, the supervisors and the database beside them;
and a cap bounds a process, not what the kernel needs for it."""
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Without one of these there is no GPU to ask torch for, which takes seconds."""
QUERY = (
    "import json, torch; available = torch.cuda.is_available();"
    "print(json.dumps({'memory_bytes': torch.cuda.get_device_properties(0).total_memory if available else None}))"
)
TIMEOUT_SECONDS = 120.0
_RETRY_SECONDS = 5.0
"""Between announcements that the database did not hear."""

logger = logging.getLogger(__name__)


def discover(settings: Settings, drivers: Sequence[str] = DRIVERS, query: str = QUERY) -> Announcement:
    """What this machine's trainers compute on, with the memory for jobs.

    A GPU runs one job at a time: there, a trainer counts what others hold as its own.
    """
    gpu_bytes = _gpu_bytes(query) if any(Path(driver).exists() for driver in drivers) else None
    kind, total, slots = ("cpu", cpu_bytes(), settings.worker_slots) if gpu_bytes is None else ("cuda", gpu_bytes, 1)
    return Announcement(device_id(kind), kind, settings.device_memory_bytes or int(total * SHARE), slots)


def cpu_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """The machine's memory, or the limit of the container that this process is in, if that is less."""
    found = re.search(r"^MemTotal:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError("meminfo: has no MemTotal")
    # As a container sees its own group, in version 2 and in version 1; "max", or a huge number, is no limit.
    files = (cgroups / "memory.max", cgroups / "memory" / "memory.limit_in_bytes")
    limits = [file.read_text().strip() for file in files if file.exists()]
    return min(int(found[1]) * 1024, *(int(limit) for limit in limits if limit.isdigit()), 1 << 62)


def announce(bind: Engine, device: Announcement, worker: str) -> bool:
    """Tell the database of the device; whether it listened."""
    try:
        with transaction(bind) as session:
            devices.announce(session, device, worker)
    except SQLAlchemyError as error:
        logger.warning("%s is not announced: %s", device.id, str(error).splitlines()[0])
        return False
    return True


def keep_announcing(
    bind: Engine, device: Announcement, worker: str, every_seconds: float = devices.ANNOUNCE_SECONDS
) -> None:
    """Announce the device for as long as this process lives, in a thread. The database may be away for any time."""

    def announce_again() -> None:
        told = False
        while True:
            if not told:
                time.sleep(min(every_seconds, _RETRY_SECONDS))
            told = announce(bind, device, worker)
            if told:
                time.sleep(every_seconds)

    threading.Thread(target=announce_again, name="announce-device", daemon=True).start()


def _gpu_bytes(query: str) -> int | None:
    """All the memory of the GPU that a trainer would take; None where torch sees none."""
    try:
        result = subprocess.run(  # noqa: S603  # our own module
            [sys.executable, "-c", query],
            env=trainer_environment(1),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
            preexec_fn=die_with_parent(),  # as in TrainerProcess
        )
        memory_bytes = json.loads(result.stdout.splitlines()[-1])["memory_bytes"]
        return None if memory_bytes is None else int(memory_bytes)
    except (subprocess.SubprocessError, OSError, ValueError, IndexError, KeyError, TypeError) as error:
        logger.warning("no GPU: %s", error)
        return None
