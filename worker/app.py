"""The Celery application of the workers: `python -m celery -A worker.app worker`."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from celery import signals

from service import database
from service.queue import celery_app
from service.settings import load_settings
from worker.calibrator import calibrate

app = celery_app(
    load_settings().redis_url,
    include=["worker.tasks"],
    worker_concurrency=1,
    # A spawned pool process imports everything anew, which takes longer than the 4 s of the default on a busy machine.
    worker_proc_alive_timeout=60.0,
)

_controllers: list[Any] = []
"""The worker of this process, once it is set up. A list because Celery's shutdown signal does not carry it."""

logger = logging.getLogger(__name__)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def remember_controller(instance: Any, **_: Any) -> None:
    _controllers[:] = [instance]


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def calibrate_once(sender: str, **_: Any) -> None:
    """Measure the machine before the pool starts, while nothing else of ours runs on it."""
    settings = load_settings()
    bind = database.engine(settings)
    try:
        calibrate(bind, settings, sender)
    finally:
        bind.dispose()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def drain(**_: Any) -> None:
    """Pass SIGTERM on to the pool: a warm shutdown waits for its tasks, and ours end at the next checkpoint.

    Celery itself tells the pool nothing until the tasks are through, which may be days.
    """
    for controller in _controllers:
        pool = controller.pool
        for pid in pool.info["processes"] if pool is not None else ():
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                logger.info("pool process %d is gone already", pid)
