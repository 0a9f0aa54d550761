"""Whether a job can run: asked by anybody, without a key, and looked at once a second at most."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import monotonic

from anyio import Lock, to_thread
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import calibrations, database, queue, schema
from service.schema import Schema
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
    _schema: Schema = field(default_factory=lambda: Schema(None))

    async def checks(self) -> dict[str, bool]:
        """Whether the database and the broker answer, the schema is one that this code can use, and a worker has
        reported what its machine can do; whether the object store answers, where there is one."""
        await self._refresh()
        return self._checks

    async def schema(self) -> Schema:
        """What is in the database; nothing where that is away."""
        await self._refresh()
        return self._schema

    async def _refresh(self) -> None:
        async with self._lock:
            if self._looked_at is None or monotonic() - self._looked_at > REMEMBER_SECONDS:
                self._checks = await to_thread.run_sync(self._look)
                self._looked_at = monotonic()

    def _look(self) -> dict[str, bool]:
        broker = queue.broker_answers(self.producer)
        checks = {"database": False, "schema": False, "broker": broker, "worker": False}
        self._schema = Schema(None)
        try:
            with database.transaction(self.engine) as session:
                self._schema = schema.look(session)
                checks |= {"database": True, "schema": self._schema.is_usable}
                if checks["schema"]:
                    checks["worker"] = calibrations.current(session) is not None
        except SQLAlchemyError as error:
            logger.info("the database is not ready: %s", error)
            checks |= {"database": False, "schema": False}
        if self.files.remote:
            checks["storage"] = self.files.is_reachable()
        return checks
