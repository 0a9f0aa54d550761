"""One supervisor in a process of its own: `python run_supervisor.py JOB_ID FAKE_TRAINER_OPTIONS`."""

from __future__ import annotations

import sys
from pathlib import Path

from service import logs
from service.settings import load_settings
from tests.chaos import guards
from worker.supervisor import supervise

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")

if __name__ == "__main__":
    settings = load_settings()
    logs.configure(settings.log_format)
    guards.remove_as_told()
    supervise(sys.argv[1], settings, command=[sys.executable, str(FAKE_TRAINER), sys.argv[2]])
