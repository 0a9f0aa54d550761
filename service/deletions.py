"""Jobs, their checkpoints, and models go: the rows in the caller's transaction, the files after its commit.

Each function returns the folder, relative to the data folder, that the caller is to retire then (`Storage.retire`),
after it has noted before the commit that the rows go (`uploads.leave`). Whatever dies in between, nothing is left by
halves.
"""

from __future__ import annotations

from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session

from service import base_models, checkpoints
from service.errors import CheckpointInUseError, JobUnfinishedError, NotFoundError
from service.ids import is_id
from service.models import Checkpoint, Job, Model, WebhookDelivery
from service.status import TERMINAL, JobStatus
from service.storage import job_dir, model_path

DELETE_MILLISECONDS = 600_000
"""For all rows of a job, of which a long curve may have tens of millions; other statements have half a minute."""


def delete_job(session: Session, job_id: str) -> str:
    """Delete a job that is over: its events, metrics and checkpoints, the model that is its output, and what webhooks
    were told, or were to be told, of it. Its Idempotency-Key stays, so that a late repetition makes no second job.

    Raises NotFoundError, JobUnfinishedError, and ModelInUseError while an unfinished job or preparation needs the
    output.
    """
    if not is_id("job", job_id):
        raise NotFoundError("job", job_id)
    # In the order in which deleting a model locks both: the model first.
    outputs = select(Model).where(Model.job_id == job_id).order_by(Model.id).with_for_update()
    session.scalars(outputs).all()
    job = _locked(session, job_id)
    if JobStatus(job.status) not in TERMINAL:
        raise JobUnfinishedError(job_id, job.status)
    for model in session.scalars(outputs, execution_options={"populate_existing": True}).all():
        base_models.check_unused(session, model)
    session.execute(delete(Model).where(Model.job_id == job_id))
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.job_id == job_id))
    session.execute(text(f"SET LOCAL statement_timeout = {DELETE_MILLISECONDS}"))
    session.execute(delete(Job).where(Job.id == job_id))  # and what has it as its parent
    return job_dir(job_id)


def delete_checkpoint(session: Session, job_id: str, step: int) -> str:
    """Delete the checkpoint of a step.

    Raises NotFoundError, and CheckpointInUseError for the newest one of a job that is not over, from which it goes on,
    and for the one that is its job's output.
    """
    job = _locked(session, job_id)  # no attempt registers another meanwhile
    row = checkpoints.get(session, job, str(step))
    if session.scalar(select(Model.id).where(Model.job_id == job_id, Model.step == step)) is not None:
        raise CheckpointInUseError(job_id, step, job.output_model_id)
    if JobStatus(job.status) not in TERMINAL and checkpoints.get(session, job, "latest").step == step:
        raise CheckpointInUseError(job_id, step)
    checkpoints.drop(session, row)
    return row.path


def delete_model(session: Session, model_id: str) -> str:
    """Delete the model, and the checkpoint that an output is; whose best is another then.

    Raises NotFoundError, and ModelInUseError while an unfinished job starts from it, or an unfinished job or
    preparation needs its tokenizer.
    """
    query = select(Model).where(Model.id == model_id).with_for_update()
    model = session.scalars(query).one_or_none() if is_id("model", model_id) else None
    if model is None:
        raise NotFoundError("model", model_id)
    base_models.check_unused(session, model)
    session.execute(update(Job).where(Job.output_model_id == model_id).values(output_model_id=None))
    output = select(Checkpoint).where(Checkpoint.job_id == model.job_id, Checkpoint.step == model.step)
    for checkpoint in session.scalars(output).all():
        checkpoints.drop(session, checkpoint)
    session.execute(delete(Model).where(Model.id == model_id))
    return model_path(model.id) if model.kind == "upload" else model.path


def _locked(session: Session, job_id: str) -> Job:
    query = select(Job).where(Job.id == job_id).with_for_update()
    job = session.scalars(query, execution_options={"populate_existing": True}).one_or_none()
    if job is None:
        raise NotFoundError("job", job_id)
    return job
