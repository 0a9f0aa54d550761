"""The guards of the service, each with a way to take it out: an oracle that stays green without its guard is none."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY, patch

from sqlalchemy import Engine, event, true, update
from sqlalchemy.orm import Session

from service import claims, database, jobs, runs
from service.models import Device, Job
from service.queue import celery_app
from service.runs import ClaimedJob
from service.settings import Settings
from service.status import Desired
from worker.ledger import Ledger

VARIABLE = "SLIMTUNE_TEST_WITHOUT"
"""Names the guard that processes of the tests start without (`remove_as_told`)."""


def _claim_what_runs() -> Any:
    next_job = claims.next_job

    def next_of_any(session: Session, *arguments: Any, **options: Any) -> ClaimedJob | None:
        session.execute(update(Job).where(Job.status == "running").values(status="queued", lease_until=None))
        return next_job(session, *arguments, **options)

    return patch("service.claims.next_job", next_of_any)


def _forget_reports() -> Any:
    write = Ledger.write

    def write_once(ledger: Ledger, *arguments: Any) -> bool:
        if write(ledger, *arguments):
            return True
        ledger._pending.clear()
        return False

    return patch.object(Ledger, "write", write_once)


def _weights_only(model: Any, _optimizer: Any, folder: Path) -> dict[str, Any]:
    checkpoint = importlib.import_module("slim_core.weights.checkpoint")  # torch: only where it is wanted
    checkpoint.load_weights(model, folder)
    training: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return training


def _final_states() -> Any:
    connected = database.engine

    def engine(settings: Settings) -> Engine:
        bind = connected(settings)

        @event.listens_for(bind, "connect")
        def silence(connection: Any, _record: object) -> None:
            connection.execute("SET session_replication_role = replica")
            connection.commit()

        return bind

    return patch("service.database.engine", engine)


def _desired() -> Any:
    renew = runs.renew

    def deaf(*arguments: Any) -> Desired:
        renew(*arguments)
        return Desired.RUN

    return patch("service.runs.renew", deaf)


def _all(*removed: tuple[str, object]) -> AbstractContextManager[object]:
    """A guard that stands in several places."""
    patches = ExitStack()
    for what, value in removed:
        patches.enter_context(patch(what, value))
    return patches


def _no_cap() -> AbstractContextManager[object]:
    """Neither the kernel's limit nor the looks of trainer and supervisor at what is held."""
    return _all(
        ("slim_core.memory.CpuMeter.enforce_cap", lambda _meter, _cap_bytes: None),
        ("worker.trainer.READING_EXCESS_BYTES", 1 << 60),
        ("worker.memory_watch.READING_EXCESS_BYTES", 1 << 60),
    )


def _no_sync() -> AbstractContextManager[object]:
    return _all(*((f"slim_core.weights.{module}.sync", lambda _path: None) for module in ("files", "checkpoint")))


REMOVE: dict[str, Callable[[], AbstractContextManager[object]]] = {
    # Writes hold whatever the attempt and the state of the job.
    "fence": lambda: patch("service.runs._fence", lambda job_id, _attempt: (Job.id == job_id, true())),
    # A run goes on however long the database was silent.
    "self-kill": lambda: patch("worker.lease.Lease.lost", False),
    # A trainer does not end with its supervisor; the fake trainer has an option for the rest.
    "lifeline": lambda: patch("worker.process.die_with_parent", lambda: None),
    # Several sweepers work at once.
    "advisory lock": lambda: patch("service.database.try_lock", lambda _session, _key: True),
    # A job may fail as often as it likes.
    "failures": lambda: patch.dict("service.runs.release.__kwdefaults__", max_failures=10**9),
    # A message starts what runs already.
    "claim": _claim_what_runs,
    # What cannot be written now is forgotten.
    "kept reports": _forget_reports,
    # Nobody repeats a message that was lost.
    "repeated wakes": lambda: patch("worker.sweeper._wake", lambda _app, _waiting, _slots: None),
    # Nobody takes back a lease that ran out.
    "lease sweep": lambda: patch("service.runs.requeue_expired", lambda _session, **_: []),
    # A resumed run has the weights, and an optimiser that begins anew.
    "moments": lambda: patch("slim_core.train.load_training", _weights_only),
    # A message is sent however long the broker takes.
    "publish deadline": lambda: patch.multiple("service.queue", PUBLISH_SECONDS=60.0, producer=celery_app),
    # No trigger of the database fires.
    "final states": _final_states,
    # A request decides by a row that may change before it writes.
    "row lock of a request": lambda: patch("service.jobs._locked", jobs.get),
    # Two slots look for room at once, each for itself.
    "device lock": lambda: patch("service.devices.locked", lambda session, device_id: session.get(Device, device_id)),
    # A heartbeat renews the lease and does not tell what the user wants.
    "desired": _desired,
    # Files get their names before they are on disk.
    "fsync": _no_sync,
    # A file of the right size is the right one.
    "hash check": lambda: patch("worker.resume._sha256", lambda _path, _beat: ANY),
    # What a failed write has left stays.
    "clean-up": lambda: patch("slim_core.weights.checkpoint.shutil.rmtree", lambda *_, **__: None),
    # A request is a new one, whatever key it brings.
    "idempotency": lambda: patch("service.idempotency.once", lambda _session, _key, _request, create: create()),
    # A process holds what it likes.
    "cap": _no_cap,
    # A loss that is no number is one like any other.
    "finite check": lambda: patch("slim_core.train.math.isfinite", lambda _value: True),
}

_removed = ExitStack()


@contextmanager
def without(guard: str | None) -> Iterator[None]:
    """Within the block this process has no such guard."""
    if guard is None:
        yield
        return
    with REMOVE[guard]():
        yield


def remove(guard: str) -> None:
    """Take out a guard for as long as this process lives."""
    _removed.enter_context(REMOVE[guard]())


def remove_as_told() -> None:
    """The guard that the environment names, if any."""
    if (guard := os.environ.get(VARIABLE)) is not None:
        remove(guard)
