"""What must hold of jobs whatever was done to them, seen from beside the service."""

from __future__ import annotations

from collections.abc import Iterator

from tests.integration.fake_trainer import loss_at
from tests.integration.stage import Stage, wait_for
from worker.resume import damage


def whole(stage: Stage, job_id: str) -> Iterator[str]:
    """Of a job with fake trainers: one run at a time, no gap in its curve, no checkpoint that is not what it says."""
    job = stage.job(job_id)
    if overlaps := stage.trace(job_id, "overlap"):
        yield f"{job_id}: attempt {overlaps[0]['attempt']} began beside another"
    rows = stage.metrics(job_id)
    if [row.step for row in rows] != list(range(1, job.step + 1)):
        yield f"{job_id}: {len(rows)} steps are on record, {job.step} were done"
    if wrong := [row.step for row in rows if row.loss != loss_at(row.step)]:
        yield f"{job_id}: the loss of step {wrong[0]} is another one"
    for row in stage.checkpoints(job_id):
        if (reason := damage(stage.settings.data_dir / row.path, row.files, lambda: None)) is not None:
            yield f"{job_id}: checkpoint {row.step}: {reason}"


def finished(stage: Stage, job_id: str, seconds: float) -> Iterator[str]:
    """The job comes to its end in time, and is whole."""
    try:
        wait_for(f"the end of {job_id}", lambda: stage.job(job_id).finished_at is not None, seconds)
    except AssertionError:
        job = stage.job(job_id)
        yield f"{job_id}: still {job.status} at step {job.step} of {job.total_steps} after {seconds:.0f} s"
        return
    job = stage.job(job_id)
    if (job.status, job.step) != ("succeeded", job.total_steps):
        yield f"{job_id}: {job.status} at step {job.step} of {job.total_steps}: {job.error}"
    yield from whole(stage, job_id)
