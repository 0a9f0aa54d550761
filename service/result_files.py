"""What a job leaves, as files that have ids: its metrics as CSV, and the files of its checkpoints.

No table knows them: an id says which job, step and file it is.

    result_<hex of the job's id>_metrics
    result_<hex of the job's id>_<step>_<position in the checkpoint's list of files>
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import checkpoints, jobs, metrics
from service.errors import NotFoundError
from service.models import Checkpoint, Job, Metric, Model
from service.status import TERMINAL, JobStatus
from service.storage import Storage, results_dir

METRICS_FILENAME = "step_metrics.csv"
COLUMNS = {
    "step": "step",
    "train_loss": "loss",
    "valid_loss": "validation_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "step_seconds": "step_seconds",
    "tokens": "tokens",
    "peak_bytes": "peak_bytes",
}
"""Of the CSV, in OpenAI's names where it has one, and what they are in a row."""
_ID = re.compile(r"result_([0-9a-f]{32})_(?:metrics|(\d{1,18})_(\d{1,3}))", re.ASCII)
_CSV_NAME = re.compile(r"metrics-([0-9a-f]{64})\.csv")
_ROWS = 5_000


@dataclass(frozen=True, slots=True)
class ResultId:
    """Which file an id means."""

    job_id: str
    step: int | None = None
    """Of the checkpoint; None for the metrics."""
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what cannot be such an id."""
        match = _ID.fullmatch(text)
        if match is None:
            return None
        job, step, index = match.groups()
        return cls(f"job_{job}") if step is None else cls(f"job_{job}", int(step), int(index))

    def __str__(self) -> str:
        job = self.job_id.removeprefix("job_")
        return f"result_{job}_metrics" if self.step is None else f"result_{job}_{self.step}_{self.index}"


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One file, as it can be downloaded."""

    id: str
    filename: str
    path: str
    """Relative, as service.storage has it."""
    bytes: int
    sha256: str
    """In hex."""
    created_at: datetime


def ids_of(job: Job, final: Checkpoint | None) -> list[str]:
    """The result files of a job: its metrics once it is over, and the files of its output."""
    if JobStatus(job.status) not in TERMINAL:
        return []
    return [str(ResultId(job.id))] + ([] if final is None else ids_of_checkpoint(final))


def ids_of_checkpoint(checkpoint: Checkpoint) -> list[str]:
    """The files of a checkpoint, in its order."""
    return [str(ResultId(checkpoint.job_id, checkpoint.step, index)) for index in range(len(checkpoint.files))]


def finals(session: Session, of: Iterable[Job]) -> dict[str, Checkpoint]:
    """The checkpoints that are the jobs' outputs, by job."""
    models = [job.output_model_id for job in of if job.output_model_id is not None]
    if not models:
        return {}
    output = (Checkpoint.job_id == Model.job_id) & (Checkpoint.step == Model.step)
    query = select(Checkpoint).join(Model, output).where(Model.id.in_(models))
    return {checkpoint.job_id: checkpoint for checkpoint in session.scalars(query)}


def get(session: Session, files: Storage, file_id: str) -> ResultFile:
    """The file that an id means; the metrics are written out when they are asked for first.

    Raises NotFoundError (of metrics, as long as the job is not over), StorageFullError.
    """
    wanted = ResultId.parse(file_id)
    if wanted is None:
        raise NotFoundError("file", file_id)
    try:
        job = jobs.get(session, wanted.job_id)
        if wanted.step is None:
            return _metrics(session, files, job)
        checkpoint = checkpoints.get(session, job, str(wanted.step))
    except NotFoundError as error:
        raise NotFoundError("file", file_id) from error
    if wanted.index >= len(checkpoint.files):
        raise NotFoundError("file", file_id)
    record = checkpoint.files[wanted.index]
    path = f"{checkpoint.path}/{record['name']}"
    return ResultFile(file_id, record["name"], path, record["bytes"], record["sha256"], checkpoint.created_at)


def _metrics(session: Session, files: Storage, job: Job) -> ResultFile:
    if JobStatus(job.status) not in TERMINAL or job.finished_at is None:
        raise NotFoundError("file", str(ResultId(job.id)))
    folder = results_dir(job.id)
    name = _written(files.names_in(folder)) or _write(session, files, job)
    match = _CSV_NAME.fullmatch(name)
    assert match is not None  # noqa: S101  # by what gave the name
    path = f"{folder}/{name}"
    size = files.stat(path).st_size
    return ResultFile(str(ResultId(job.id)), METRICS_FILENAME, path, size, match[1], job.finished_at)


def _written(names: Sequence[str]) -> str | None:
    return next((name for name in names if _CSV_NAME.fullmatch(name)), None)


def _write(session: Session, files: Storage, job: Job) -> str:
    """The metrics as a file whose name has its hash; two requests at once write the same. Flat in memory."""
    with files.upload(2**63) as upload:
        upload.write(_lines([list(COLUMNS)]))
        after, more = -1, True
        while more:
            rows, more = metrics.page(session, job.id, after, _ROWS)
            if rows:
                upload.write(_lines(_values(row) for row in rows))
                after = rows[-1].step
                for row in rows:
                    session.expunge(row)
        name = f"metrics-{upload.sha256}.csv"
        upload.commit(f"{results_dir(job.id)}/{name}")
    return name


def _values(row: Metric) -> list[object]:
    return [getattr(row, column) for column in COLUMNS.values()]


def _lines(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
