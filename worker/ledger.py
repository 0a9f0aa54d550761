"""Every database write about one attempt: fenced, batched, and held back while the database is away."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from service import checkpoints, runs
from service.database import transaction
from service.runs import ClaimedJob
from service.settings import Settings
from service.status import Desired
from worker.lease import Lease, LeaseLostError, now
from worker.messages import Checkpoint, Evaluation, GradientCheck, Metric, Probed
from worker.numbers import HEARTBEAT_FAILURES
from worker.publisher import Publisher

METRICS_SECONDS = 1.0
"""The longest that a step stays unwritten while the database answers."""
RETRY_SECONDS = 0.5
MAX_PENDING = 10_000
"""Entries that wait for the database before the trainer is left to wait as well."""
BATCH = 1_000
"""Entries in one transaction at most: it must be short against the lease, which counts from its begin."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Something for the job's log."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)


Entry = Metric | Evaluation | Checkpoint | Probed | GradientCheck | Event


def is_outage(error: SQLAlchemyError) -> bool:
    """Whether the database was not there to answer, so that the same call may succeed later."""
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return isinstance(error, OperationalError | InterfaceError | PoolTimeoutError)


class Ledger:
    """What one attempt has to tell the database, and what the database said last."""

    def __init__(self, bind: Engine, publisher: Publisher, job: ClaimedJob, settings: Settings) -> None:
        self._bind = bind
        self._publisher = publisher
        self._job = job
        self._settings = settings
        self._pending: list[Entry] = []
        self._written_at = 0.0
        self._retry_at = 0.0
        self.lease = Lease(settings.self_kill_seconds)
        self.desired = Desired.RUN
        self.last_step = job.step
        self.last_checkpoint: int | None = None
        """Step of the newest checkpoint: of this attempt, registered or about to be, or the one it resumed from."""
        self.progressed = False
        """Whether this attempt made a checkpoint."""

    @property
    def full(self) -> bool:
        return len(self._pending) >= MAX_PENDING

    def add(self, entry: Entry) -> None:
        self._pending.append(entry)
        if isinstance(entry, Metric):
            self.last_step = entry.step
        elif isinstance(entry, Checkpoint):
            self.last_checkpoint = entry.step
            self.progressed = True

    def discard(self) -> None:
        """Forget what was not written: the database refuses it, and the end of the run must still be written."""
        self._pending.clear()
        self.progressed = False
        self.last_checkpoint = None

    def beat(self) -> None:
        """Write if something is due: a heartbeat, a second's metrics, anything else at once.

        Raises FencedError, and LeaseLostError once the database has been silent for too long.
        """
        if self.lease.lost:
            raise LeaseLostError(f"not renewed for {self.lease.age_seconds:.0f} s")
        if self._due():
            self.write()

    def hold(self) -> None:
        """Renew the lease now, waiting for the database as long as the lease allows. Raises as `beat` does."""
        while not self.write():
            self.beat()
            time.sleep(RETRY_SECONDS)

    def checkpoints(self) -> list[tuple[int, str, list[dict[str, Any]]]]:
        """(step, path, files) of the registered checkpoints, newest first. Waits and raises as `hold` does."""
        while True:
            try:
                with transaction(self._bind) as session:
                    return [(row.step, row.path, row.files) for row in checkpoints.page(session, self._job.id)]
            except SQLAlchemyError as error:
                if not is_outage(error):
                    raise
                self._log_outage(error)
            self.beat()
            time.sleep(RETRY_SECONDS)

    def write(self, conclude: Callable[[Session], None] | None = None) -> bool:
        """Renew the lease, write what waits and run `conclude`, in one transaction; False if the database is away.

        What was not written stays pending, and is safe to write again should the commit have arrived and only its
        answer been lost. At most `BATCH` entries go into one transaction; `conclude` comes with the last of them.
        Raises FencedError.
        """
        while conclude is not None and len(self._pending) > BATCH:
            if not self._write_batch(None):
                return False
        return self._write_batch(conclude)

    def _write_batch(self, conclude: Callable[[Session], None] | None) -> bool:
        began = now()
        batch = self._pending[:BATCH]
        superseded: list[str] = []
        try:
            with transaction(self._bind) as session:
                self.desired = runs.renew(session, self._job.id, self._job.attempt, self._settings.lease_seconds)
                superseded = self._record(session, batch)
                if conclude is not None:
                    conclude(session)
        except SQLAlchemyError as error:
            if not is_outage(error):
                raise
            self._retry_at = now() + RETRY_SECONDS
            self._log_outage(error)
            return False
        self.lease.renewed(began)
        self._written_at = began
        self._retry_at = 0.0
        del self._pending[: len(batch)]
        self._remove(superseded)
        return True

    def _due(self) -> bool:
        clock = now()
        if clock < self._retry_at:
            return False
        if len(self._pending) >= BATCH or any(not isinstance(entry, Metric) for entry in self._pending):
            return True
        if self._pending and clock - self._written_at >= METRICS_SECONDS:
            return True
        return clock - self.lease.renewed_at >= self._settings.heartbeat_seconds

    def _record(self, session: Session, batch: list[Entry]) -> list[str]:
        """Write entries in the order in which it came; returns the folders to delete after the commit."""
        superseded: list[str] = []
        for kind, group in itertools.groupby(batch, key=type):
            if kind is Metric:
                rows = [entry.row() for entry in group if isinstance(entry, Metric)]
                runs.record_metrics(session, self._job.id, self._job.attempt, rows)
            else:
                for entry in group:
                    superseded += self._record_one(session, entry)
        return superseded

    def _record_one(self, session: Session, entry: Entry) -> list[str]:
        job_id, attempt = self._job.id, self._job.attempt
        match entry:
            case Checkpoint():
                path = f"{self._job.checkpoints_dir}/{entry.name}"
                files, loss = entry.files, entry.validation_loss
                return checkpoints.register(
                    session, job_id, attempt, entry.step, files=files, path=path, validation_loss=loss
                )
            case Evaluation():
                runs.record_evaluation(session, job_id, attempt, entry.step, entry.loss)
            case Probed(peak_bytes):
                runs.record_probe(session, job_id, attempt, peak_bytes)
            case GradientCheck():
                check = asdict(entry)
                runs.record_gradient_check(session, job_id, attempt, check.pop("peak_bytes"), check)
            case Event():
                runs.add_event(session, job_id, attempt, entry.type, entry.data)
            case Metric():
                runs.record_metrics(session, job_id, attempt, [entry.row()])
        return []

    def _log_outage(self, error: SQLAlchemyError) -> None:
        HEARTBEAT_FAILURES.inc()
        logger.warning("the database does not answer: %s", str(error).splitlines()[0])

    def _remove(self, folders: list[str]) -> None:
        for folder in folders:
            try:
                self._publisher.remove(folder)
            except OSError as error:  # no row knows it any more, so the next attempt removes it as a stray
                logger.warning("%s not deleted: %s", folder, error)
