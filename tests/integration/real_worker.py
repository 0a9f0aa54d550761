"""The Celery application of worker/app.py with its real trainers, without the seconds that calibrating takes."""

from __future__ import annotations

from celery.signals import celeryd_after_setup

from worker.app import app, calibrate_once

__all__ = ["app"]

celeryd_after_setup.disconnect(calibrate_once)
