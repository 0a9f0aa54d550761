"""A worker's own numbers for Prometheus, served by its main process: what its machine and its trainers hold, read when
it is asked for from /proc and the locks of the slots, so also while the database is away; and what its pool processes
count (worker/numbers.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.devices import Announcement
from service.settings import Settings, split_address
from worker.memory_watch import ProcessTree, descendants
from worker.slot import locks_dir

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's variable: the folder of the values of the pool processes, which inherit it."""
PATH = "/metrics"
REQUEST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RunningTrainer:
    """A trainer below this process."""

    slot: int
    """Whose lock it holds."""
    cap_bytes: int
    private_bytes: int
    """Of it and all that it started."""


def trainers(root: int, locks: Path, device: str) -> list[RunningTrainer]:
    """The trainers that descend from a process, by slot. They lead sessions of their own, and hold locks of slots."""
    found = []
    for pid in descendants(root):
        slot = _slot_of(pid, locks, device) if _leads_a_session(pid) and pid != root else None
        if slot is not None:
            cap_bytes = _cap_of(locks / f"{device}.{slot}.lock")
            found.append(RunningTrainer(slot, cap_bytes, ProcessTree(pid).private_bytes()))
    return sorted(found, key=lambda trainer: trainer.slot)


def _leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _slot_of(pid: int, locks: Path, device: str) -> int | None:
    prefix = f"{locks}/{device}."
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                index = str(descriptor.readlink()).removeprefix(prefix).removesuffix(".lock")
                if index.isdecimal():
                    return int(index)
    except (FileNotFoundError, PermissionError):  # it ended, or is about to
        return None
    return None


def _cap_of(lock: Path) -> int:
    try:
        return int(json.loads(lock.read_bytes())["memory_cap_bytes"])
    except (OSError, ValueError, KeyError):  # it ended, and another is about to take the slot
        return 0


class MachineNumbers(Collector):
    """Of the device and its trainers."""

    def __init__(self, device: Announcement, data_dir: Path) -> None:
        self._device = device
        self._locks = locks_dir(data_dir.resolve())
        self.calibrated_at: float | None = None
        """When the calibration that this worker found or made was kept, in seconds since 1970."""

    def collect(self) -> Iterable[Metric]:
        running = trainers(os.getpid(), self._locks, self._device.id)
        numbers: dict[str, tuple[str, float | None]] = {
            "slimtune_worker_device_memory_bytes": (
                "What the caps of the jobs here may add up to.", self._device.memory_bytes,
            ),
            "slimtune_worker_reserved_bytes": (
                "The sum of the caps of the trainers that live.", sum(trainer.cap_bytes for trainer in running),
            ),
            "slimtune_worker_slots": ("Jobs that run here at once, at most.", self._device.slots),
            "slimtune_worker_trainers": ("Trainers that live, each in a slot.", len(running)),
            "slimtune_worker_calibration_timestamp_seconds": (
                "When the machine was measured, as this worker found at its start; Unix time.", self.calibrated_at,
            ),
        }  # fmt: skip
        for name, (meaning, value) in numbers.items():
            if value is not None:
                yield GaugeMetricFamily(name, meaning, value=value)
        held = GaugeMetricFamily(
            "slimtune_worker_trainer_private_bytes",
            "Private memory of a trainer with all that it started; it counts against the cap of a job on a CPU.",
            labels=("slot",),
        )
        caps = GaugeMetricFamily("slimtune_worker_trainer_cap_bytes", "The cap of its job.", labels=("slot",))
        for trainer in running:
            held.add_metric((str(trainer.slot),), trainer.private_bytes)
            caps.add_metric((str(trainer.slot),), trainer.cap_bytes)
        yield from (held, caps)


class Exposition:
    """Serves the numbers of a worker until `close`. `machine` is what they are asked of."""

    def __init__(self, settings: Settings, device: Announcement) -> None:
        """Opens the port, and prepares the folder of the pool processes' numbers, which must begin after this. Raises
        OSError."""
        assert settings.worker_metrics_address is not None  # noqa: S101  # whoever wants none makes none
        host, port = split_address(settings.worker_metrics_address)
        token = settings.metrics_token
        self.machine = MachineNumbers(device, settings.data_dir)
        registry = CollectorRegistry()
        self._folder = tempfile.TemporaryDirectory(prefix="slimtune-metrics-", ignore_cleanup_errors=True)
        # What tidies up /tmp by age leaves a folder alone that is locked: a pool process that begins later wants it.
        self._lock = os.open(self._folder.name, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        registry.register(self.machine)
        ProcessCollector(registry=registry)
        MultiProcessCollector(registry, self._folder.name)  # type: ignore[no-untyped-call]
        application = guarded(make_wsgi_app(registry), None if token is None else token.get_secret_value())
        self._server = make_server(host, port, application, _server_class(host), handler_class=_Handler)
        self.port = self._server.server_port
        os.environ[MULTIPROCESS] = self._folder.name
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        os.environ.pop(MULTIPROCESS, None)
        os.close(self._lock)
        self._folder.cleanup()


Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def guarded(application: Application, token: str | None) -> Application:
    """At one path, and where there is a token for those who send it."""
    wanted = None if token is None else f"Bearer {token}".encode()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            return _refuse(start_response, "404 Not Found")
        sent = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
        if wanted is not None and not secrets.compare_digest(sent, wanted):
            return _refuse(start_response, "401 Unauthorized", ("WWW-Authenticate", "Bearer"))
        return application(environ, start_response)

    return answer


def _refuse(start_response: Callable[..., Any], status: str, *headers: tuple[str, str]) -> Iterator[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return iter((f"{status}\n".encode(),))


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, *_: object) -> None:
        """Nothing: it is asked every few seconds."""


def _server_class(host: str) -> type[WSGIServer]:
    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    return Server
