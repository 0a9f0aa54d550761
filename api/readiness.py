"""Whether a job can run: asked by anybody, without a key, and looked at once a second at most."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import monotonic

from anyio import Lock, to_thread
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import calibrations, database, queue
from service.storage import Storage

REMEMBER_SECONDS = 1.0

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Readiness:
    """For one process, on its event loop. Who asks while it looks waits for the same answer, and holds no thread."""

    engine: Engine
    producer: Celery
    files: Storage
    _lock: Lock = field(default_factory=Lock)
    _looked_at: float | None = None
    _checks: dict[str, bool] = field(default_factory=dict)

    async def checks(self) -> dict[str, bool]:
        """Whether the database and the broker answer, and a worker has reported what its machine can do; whether the
        object store answers, where there is one."""
        async with self._lock:
            if self._looked_at is None or monotonic() - self._looked_at > REMEMBER_SECONDS:
                self._checks = await to_thread.run_sync(self._look)
                self._looked_at = monotonic()
            return self._checks

    def _look(self) -> dict[str, bool]:
        checks = {"database": True, "broker": queue.broker_answers(self.producer), "worker": False}
        try:
            with database.transaction(self.engine) as session:
                checks["worker"] = calibrations.current(session) is not None
        except SQLAlchemyError as error:  # out of reach, or not migrated yet
            logger.info("the database is not ready: %s", error)
            checks["database"] = False
        if self.files.remote:
            checks["storage"] = self.files.is_reachable()
        return checks
