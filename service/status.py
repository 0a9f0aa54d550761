"""The states of a job and the legal ways between them: one table for code, checks and tests."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Desired(StrEnum):
    """What the user wants of a job, kept apart from what the job is."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


Action = Literal["cancel", "pause", "resume"]

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.PAUSED}),
    JobStatus.RUNNING: TERMINAL | {JobStatus.PAUSED, JobStatus.QUEUED},
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}

Outcome = tuple[JobStatus, Desired]

REQUESTS: dict[tuple[Action, JobStatus, Desired], Outcome] = {
    ("cancel", JobStatus.QUEUED, Desired.RUN): (JobStatus.CANCELLED, Desired.CANCEL),
    ("cancel", JobStatus.PAUSED, Desired.PAUSE): (JobStatus.CANCELLED, Desired.CANCEL),
    ("cancel", JobStatus.RUNNING, Desired.RUN): (JobStatus.RUNNING, Desired.CANCEL),
    ("cancel", JobStatus.RUNNING, Desired.PAUSE): (JobStatus.RUNNING, Desired.CANCEL),
    ("cancel", JobStatus.RUNNING, Desired.CANCEL): (JobStatus.RUNNING, Desired.CANCEL),
    ("cancel", JobStatus.CANCELLED, Desired.CANCEL): (JobStatus.CANCELLED, Desired.CANCEL),
    ("pause", JobStatus.QUEUED, Desired.RUN): (JobStatus.PAUSED, Desired.PAUSE),
    ("pause", JobStatus.PAUSED, Desired.PAUSE): (JobStatus.PAUSED, Desired.PAUSE),
    ("pause", JobStatus.RUNNING, Desired.RUN): (JobStatus.RUNNING, Desired.PAUSE),
    ("pause", JobStatus.RUNNING, Desired.PAUSE): (JobStatus.RUNNING, Desired.PAUSE),
    ("resume", JobStatus.PAUSED, Desired.PAUSE): (JobStatus.QUEUED, Desired.RUN),
    ("resume", JobStatus.QUEUED, Desired.RUN): (JobStatus.QUEUED, Desired.RUN),
    ("resume", JobStatus.RUNNING, Desired.RUN): (JobStatus.RUNNING, Desired.RUN),
    # Takes the pause back; should the trainer stop all the same, the run ends in `queued` (runs.finish).
    ("resume", JobStatus.RUNNING, Desired.PAUSE): (JobStatus.RUNNING, Desired.RUN),
}
"""What a request does to (status, desired). What is not listed is a conflict."""

PENDING, RUNNING, READY, FAILED = "pending", "running", "ready", "failed"
"""Of what the preparer makes (preparations.py)."""
UNFINISHED = (PENDING, RUNNING)
