"""Checkpoints as rows: which folders are whole, which to resume from, which to delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from service import events, runs
from service.errors import NoCheckpointError, NotFoundError
from service.jsonable import finite
from service.models import Checkpoint, Job, Model
from service.status import TERMINAL, JobStatus


def register(
    session: Session,
    job_id: str,
    attempt: int,
    step: int,
    *,
    files: Sequence[dict[str, Any]],
    path: str,
    validation_loss: float | None = None,
) -> list[str]:
    """Record a checkpoint whose folder is complete on disk. Raises FencedError.

    `files` are {name, bytes, sha256 in hex}, `path` is relative to the data folder. Returns the folders (relative too)
    to delete once the transaction is committed: all but the newest `keep` of the job's spec and the best. The attempt
    has made progress: the count of failures starts again.
    """
    job = runs.fenced_update(session, job_id, attempt, failures=0)
    # Replaced: this step of an earlier attempt, and later ones, which it found unusable or would have gone on from.
    stale = delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step >= step).returning(Checkpoint.path)
    superseded = list(session.scalars(stale))
    row = {
        "job_id": job_id,
        "step": step,
        "attempt": attempt,
        "files": [dict(file) for file in files],
        "path": path,
        "validation_loss": finite(validation_loss),
    }
    session.execute(insert(Checkpoint).values(row))
    superseded += _prune(session, job_id, int(job.spec.get("keep", 2)))
    kept = set(session.scalars(select(Checkpoint.path).where(Checkpoint.job_id == job_id)))
    events.record(session, job_id, attempt, "checkpoint", {"step": step, "validation_loss": validation_loss})
    return [folder for folder in superseded if folder not in kept]


def page(session: Session, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints, newest first; there are never many."""
    return list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())))


def get(session: Session, job: Job, which: str) -> Checkpoint:
    """The checkpoint of a step (digits), or `latest`, `best` (lowest validation loss) or `final` (the output's).

    Raises NotFoundError.
    """
    query = select(Checkpoint).where(Checkpoint.job_id == job.id).order_by(Checkpoint.step.desc()).limit(1)
    if which == "best":
        query = query.where(Checkpoint.is_best)
    elif which.isascii() and which.isdigit() and len(which) <= 18:
        query = query.where(Checkpoint.step == int(which))
    elif which == "final":
        # The output may have been deleted, and the checkpoint with it.
        output = select(Model.step).where(Model.id == job.output_model_id).scalar_subquery()
        query = query.where(Checkpoint.step == output)
    elif which != "latest":
        raise NotFoundError("checkpoint", which)
    found = session.scalars(query).one_or_none()
    if found is None:
        raise NotFoundError(
            "checkpoint", which, _WHY_MISSING.get(which, "GET /jobs/{id}/checkpoints lists what is there")
        )
    return found


_WHY_MISSING = {
    "final": 'only a job that has succeeded has one; "latest" is the newest of any job',
    "best": 'only a job with validation data has one; "latest" is the newest of any job',
    "latest": "the first comes after `checkpoint_every` steps, five minutes, at a pause or at the end",
}


def to_read(session: Session, job: Job, which: str) -> Checkpoint:
    """As `get`. Raises NoCheckpointError where the job is over and has none that could be asked for."""
    try:
        return get(session, job, which)
    except NotFoundError:
        if JobStatus(job.status) in TERMINAL and not page(session, job.id):
            raise NoCheckpointError(job.id, job.status) from None
        raise


def file_of(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The record {name, bytes, sha256} of one file. Raises NotFoundError for a name that the row does not list."""
    for record in checkpoint.files:
        if record["name"] == name:
            return record
    raise NotFoundError("file", name)


def drop(session: Session, row: Checkpoint) -> None:
    """Delete the row, whose job's row is locked; the best is then another."""
    session.execute(delete(Checkpoint).where(Checkpoint.job_id == row.job_id, Checkpoint.step == row.step))
    _mark_best(session, row.job_id, page(session, row.job_id))


def _prune(session: Session, job_id: str, keep: int) -> list[str]:
    """Mark the best, delete the rows of the others beyond the newest `keep`, return their folders."""
    rows = page(session, job_id)
    best = _mark_best(session, job_id, rows)
    surplus = [row for row in rows[keep:] if row.step != best]
    if surplus:
        steps = [row.step for row in surplus]
        session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step.in_(steps)))
    return [row.path for row in surplus]


def _mark_best(session: Session, job_id: str, rows: Sequence[Checkpoint]) -> int | None:
    """The step of the one with the lowest validation loss, if any has one."""
    losses = [(row.validation_loss, row.step) for row in rows if row.validation_loss is not None]
    best = min(losses)[1] if losses else None
    session.execute(update(Checkpoint).where(Checkpoint.job_id == job_id).values(is_best=Checkpoint.step == best))
    return best
