"""The Celery application of worker/app.py with a task that runs the fake trainer (`-A tests.integration.fake_worker`).

The task is declared here, as worker/tasks.py does it, because pool processes are spawned: they know only what they
import. The fake trainer's options come from FAKE_TRAINER_OPTIONS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from celery.signals import celeryd_after_setup

from service.queue import TASK
from service.settings import load_settings
from tests.chaos import guards
from worker.app import app, calibrate_once
from worker.supervisor import supervise

celeryd_after_setup.disconnect(calibrate_once)  # seconds of computing in every test
guards.remove_as_told()
app.conf.include = ["tests.integration.fake_worker"]


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def run(job_id: str) -> None:
    fake_trainer = str(Path(__file__).with_name("fake_trainer.py"))
    supervise(job_id, load_settings(), command=[sys.executable, fake_trainer, os.environ["FAKE_TRAINER_OPTIONS"]])
