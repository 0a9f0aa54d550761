"""The Celery tasks."""

from __future__ import annotations

from service.queue import TASK
from service.settings import load_settings
from worker.app import app
from worker.supervisor import supervise


@app.task(name=TASK)  # type: ignore[untyped-decorator]
def run(job_id: str) -> None:
    """Look for work, and run one attempt at what was found."""
    supervise(job_id, load_settings())
