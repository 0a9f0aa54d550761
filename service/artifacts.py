"""The loss curve of a job as files for other tools: a CSV, and TensorBoard's events. Made from the rows when they are
asked for, a page of rows at a time, so also of a job that runs.

A resumed job repeats steps from its checkpoint on, and the new rows replace the old ones. Until it has caught up, rows
of steps that are still to be repeated (or never will be, if it ends first) are left out: a file ends at the job's own
step.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, Row
from sqlalchemy.orm import Session

from service import database, jobs, metrics, tensorboard_events
from service.errors import NotFoundError
from service.models import Job
from service.status import TERMINAL, JobStatus

CSV_NAME = "metrics.csv"
CSV_COLUMNS = (
    *("step", "attempt", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens", "peak_bytes"),
    *("validation_loss", "created_at"),
)
SCALARS = ("loss", "learning_rate", "grad_norm", "step_seconds", "peak_bytes", "validation_loss")
"""Columns that are tags in TensorBoard, `tokens_per_second` beside them."""
PAGE_ROWS = 1_000


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that can be made of a job's rows."""

    name: str
    media_type: str
    steps: int
    """Up to this step."""
    complete: bool
    """Whether the job is over, so that there will never be more."""
    job: Job


def listed(session: Session, job_id: str) -> list[Artifact]:
    """All of a job's. Raises NotFoundError."""
    job = jobs.get(session, job_id)
    names = {CSV_NAME: "text/csv", _events_name(job): "application/octet-stream"}
    complete = JobStatus(job.status) in TERMINAL
    return [Artifact(name, media_type, job.step, complete, job) for name, media_type in names.items()]


def get(session: Session, job_id: str, name: str) -> Artifact:
    """The artifact of this name. Raises NotFoundError."""
    for artifact in listed(session, job_id):
        if artifact.name == name:
            return artifact
    raise NotFoundError("file", name)


def content(bind: Engine, tenant: str, artifact: Artifact) -> Iterator[bytes]:
    """The bytes, in pieces. Holds a page of rows, and a connection only while it reads one."""
    pages = _pages(bind, tenant, artifact.job)
    yield from _csv(pages) if artifact.name == CSV_NAME else _events(pages, artifact.job)


def _events_name(job: Job) -> str:
    """The same at each request, and one that TensorBoard takes for a file of events."""
    return f"events.out.tfevents.{int(job.created_at.timestamp())}.slimtune"


def _pages(bind: Engine, tenant: str, job: Job) -> Iterator[list[Row[Any]]]:
    after = -1
    while True:
        with database.reading(bind, tenant) as session:
            rows = metrics.between(session, job.id, after, job.step, PAGE_ROWS)
        if not rows:
            return
        yield rows
        after = rows[-1].step


def _csv(pages: Iterable[list[Row[Any]]]) -> Iterator[bytes]:
    yield _csv_lines([CSV_COLUMNS])
    for rows in pages:
        yield _csv_lines((*(getattr(row, name) for name in CSV_COLUMNS[:-1]), _rfc3339(row.created_at)) for row in rows)


def _csv_lines(rows: Iterable[Iterable[object]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _events(pages: Iterable[list[Row[Any]]], job: Job) -> Iterator[bytes]:
    created = job.created_at.timestamp()
    yield tensorboard_events.header(created) + tensorboard_events.text(created, "job", _description(job))
    step, tokens = 0, 0
    for rows in pages:
        written = []
        for row in rows:
            values = {name: value for name in SCALARS if (value := getattr(row, name)) is not None}
            if row.tokens is not None and row.step > step:
                # Where rows have been thinned out, the mean of the steps since the last one.
                if row.step_seconds:
                    values["tokens_per_second"] = (row.tokens - tokens) / (row.step - step) / row.step_seconds
                step, tokens = row.step, row.tokens
            written.append(tensorboard_events.scalars(row.created_at.timestamp(), row.step, values))
        yield b"".join(written)


def _description(job: Job) -> str:
    """The job as it was asked for and as it is planned: Markdown, as JSON in a block of code."""
    plan = {name: value for name, value in job.plan.items() if name != "frontier"}
    described = {"id": job.id, "memory_cap_bytes": job.memory_cap_bytes, "request": job.spec, "plan": plan}
    return "\n".join(f"    {line}" for line in json.dumps(described, indent=2).splitlines())
