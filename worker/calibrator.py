"""Measure the machine when a worker starts, in a child process, and keep what it says for the planner."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Engine

from service import calibrations
from service.database import transaction
from service.settings import Settings
from slim_core.planning import Calibration
from worker.environment import allocator_environment, trainer_environment
from worker.process import die_with_parent
from worker.slot import device_id, whole_device

CALIBRATE_COMMAND = (sys.executable, "-m", "slim_core.calibrate")
TIMEOUT_SECONDS = 400.0
NO_HEAP = (
    "trainers run without their heap of tensors (docs/decisions/0008-the-tensor-heap.md) and hold up to 4 % more than "
    "planned: install a C compiler, then slimtune again, in a path without spaces"
)

logger = logging.getLogger(__name__)


class CalibrationError(Exception):
    """The measuring process failed; the message carries the end of its log."""


def _machine(device: str, threads: int) -> str:
    """As `Calibration.machine`."""
    heap = "with" if "LD_PRELOAD" in allocator_environment() else "without"
    return f"{device}, {threads} threads, torch {importlib.metadata.version('torch')}, {heap} the heap of tensors"


def _known(bind: Engine, machine: str, younger_than_seconds: float) -> Calibration | None:
    with transaction(bind) as session:
        stored = calibrations.of_machine(session, machine, younger_than_seconds)
    try:
        return None if stored is None else Calibration.from_json(stored)
    except (TypeError, ValueError):  # of a release that measured something else
        return None


def measure(threads: int, command: Sequence[str] = CALIBRATE_COMMAND) -> Calibration:
    """What the machine can do with `threads` threads. Raises CalibrationError."""
    if "LD_PRELOAD" not in allocator_environment():
        logger.warning(NO_HEAP)
    try:
        result = subprocess.run(  # noqa: S603  # our own module
            [*command, "--threads", str(threads)],
            env=trainer_environment(threads),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=TIMEOUT_SECONDS,
            preexec_fn=die_with_parent(),  # as in TrainerProcess
        )
        return Calibration.from_json(json.loads(result.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        log = error.stderr.decode("utf-8", "replace")[-2000:]
        raise CalibrationError(f"exit status {error.returncode}: {log}") from error
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError, TypeError) as error:
        raise CalibrationError(f"{type(error).__name__}: {error}") from error


def measured_now(settings: Settings, command: Sequence[str] = CALIBRATE_COMMAND) -> Calibration:
    """`measure` for trainers with these settings, with the name of what was measured. Raises CalibrationError."""
    machine = _machine(device_id(settings.device_kind), settings.trainer_threads)
    return replace(measure(settings.trainer_threads, command), machine=machine)


def calibrate(
    bind: Engine, settings: Settings, worker: str, command: Sequence[str] = CALIBRATE_COMMAND
) -> Calibration | None:
    """Measure and store, unless this machine was measured lately; None, with the reason in the log, where that was not
    possible.

    A worker works without: the planner falls back to the last stored calibration, or to cautious defaults. While a
    trainer runs on this device nothing is measured: the numbers would be those of half a machine.
    """
    try:
        device = device_id(settings.device_kind)
        with whole_device(settings.data_dir, device, slots=settings.worker_slots) as idle:
            if not idle:
                logger.info("not calibrated: the device is in use")
                return None
            machine = _machine(device, settings.trainer_threads)
            if (known := _known(bind, machine, settings.calibration_seconds)) is not None:
                logger.info("calibrated before: %s", known.source)
                return known
            calibration = measured_now(settings, command)
        with transaction(bind) as session:
            calibrations.store(session, calibration.device, worker, calibration.to_json())
    except Exception:
        logger.exception("not calibrated")
        return None
    logger.info("calibrated: %s", calibration)
    return calibration
