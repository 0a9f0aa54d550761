"""The Celery application of the workers: `python -m celery -A worker.app worker`."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from celery import signals
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from service import calibrations, database, logs
from service.queue import celery_app
from service.settings import load_settings
from worker import device
from worker.calibrator import calibrate
from worker.environment import SPIN_COUNT
from worker.exposition import Exposition
from worker.preparer import Preparer

app = celery_app(
    load_settings().redis_url,
    include=["worker.tasks"],
    worker_concurrency=load_settings().worker_slots,
    # A spawned pool process imports everything anew, which takes longer than the 4 s of the default on a busy machine.
    worker_proc_alive_timeout=60.0,
)

_controllers: list[Any] = []
"""The worker of this process, once it is set up. A list because Celery's shutdown signal does not carry it."""

_preparers: list[Preparer] = []
"""The preparer of this process, while there is one."""

_expositions: list[Exposition] = []
"""Of the numbers of this worker, while it serves them."""

logger = logging.getLogger(__name__)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def configure_logs(loglevel: int, **_: Any) -> None:
    """In place of what Celery would set up, here and in each pool process."""
    logs.configure(load_settings().log_format, loglevel)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def remember_controller(instance: Any, **_: Any) -> None:
    _controllers[:] = [instance]
    # With it the pool processes say "calling self.run()" in a format of billiard's own.
    os.environ.pop("_MP_FORK_LOGLEVEL_", None)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def announce_device(sender: str, **_: Any) -> None:
    """Tell the database what jobs can run on here, now and every minute; tell the pool, which is not there yet."""
    settings = load_settings()
    found = device.discover(settings)
    os.environ["SLIMTUNE_DEVICE_KIND"] = found.kind
    os.environ["SLIMTUNE_WORKER_SLOTS"] = str(found.slots)
    if found.slots > 1:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    load_settings.cache_clear()
    logger.info("%s", found)
    bind = database.engine(settings)
    device.announce(bind, found, sender)
    device.keep_announcing(bind, found, sender)
    if settings.worker_metrics_address is not None:
        try:
            _expositions[:] = [Exposition(settings, found)]
        except OSError as error:  # jobs run without it
            logger.error("no numbers at %s: %s", settings.worker_metrics_address, error)  # noqa: TRY400  # no trace


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def calibrate_once(sender: str, **_: Any) -> None:
    """Measure the machine before the pool starts, while nothing else of ours runs on it."""
    settings = load_settings()
    bind = database.engine(settings)
    try:
        calibrate(bind, settings, sender)
        _expose_calibration(bind)
    finally:
        bind.dispose()


def _expose_calibration(bind: Engine) -> None:
    try:
        with database.reading(bind) as session:
            measured_at = calibrations.measured_at(session)
    except SQLAlchemyError as error:
        logger.warning("the age of the calibration is not known: %s", str(error).splitlines()[0])
        return
    for exposition in _expositions:
        exposition.machine.calibrated_at = None if measured_at is None else measured_at.timestamp()


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def start_preparer(sender: Any, **_: Any) -> None:
    """After the calibration, which wants the machine for itself."""
    settings = load_settings()
    _preparers[:] = [Preparer(database.engine(settings), settings, str(sender.hostname))]
    _preparers[0].start()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def stop_preparer(**_: Any) -> None:
    """Its work goes to another worker at once."""
    for preparer in _preparers:
        preparer.stop()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def await_preparer(**_: Any) -> None:
    for preparer in _preparers:
        preparer.join()
    for exposition in _expositions:
        exposition.close()


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
