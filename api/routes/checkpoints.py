"""Checkpoints of a job, and their files."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Path
from starlette.responses import Response

from api.dependencies import CallerDep, ContextDep, SessionDep
from api.downloads import Download
from api.errors import InvalidRequestError
from api.problems import STORAGE_ERRORS, documented
from api.responses import CheckpointResponse, Page
from service import checkpoints, database, deletions, jobs, uploads

router = APIRouter(prefix="/jobs/{job_id}/checkpoints", tags=["checkpoints"])

MISSING = ("404 job_not_found", "404 checkpoint_not_found")

Which = Annotated[str, Path(description="A step, or `latest`, `best` (validation loss), `final` (of a succeeded job).")]


@router.get("", summary="List checkpoints", responses=documented("404 job_not_found"))
def list_all(job_id: str, session: SessionDep) -> Page[CheckpointResponse]:
    """All that are kept, newest first."""
    rows = checkpoints.page(session, jobs.get(session, job_id).id)
    return Page[CheckpointResponse](data=[CheckpointResponse.of_row(row) for row in rows], has_more=False)


@router.get("/{step}", summary="Get a checkpoint", responses=documented(*MISSING))
def get(job_id: str, step: Which, session: SessionDep) -> CheckpointResponse:
    return CheckpointResponse.of_row(checkpoints.get(session, jobs.get(session, job_id), step))


@router.delete(
    "/{step}",
    status_code=204,
    summary="Delete a checkpoint",
    responses=documented(*MISSING, "409 checkpoint_in_use", 422),
)
def delete(
    job_id: str,
    step: Annotated[str, Path(description="A step, by its number alone: what `latest` means may change.")],
    session: SessionDep,
    context: ContextDep,
    background: BackgroundTasks,
) -> None:
    """Not the newest one of a job that is not over, from which it goes on, nor the one that is a job's output: that
    goes with its model."""
    job = jobs.get(session, job_id)
    if step in ("latest", "best", "final"):
        raise InvalidRequestError(("step", "name the checkpoint to delete by its step"))
    folder = deletions.delete_checkpoint(session, job.id, checkpoints.get(session, job, step).step)
    uploads.leave(context.storage, folder)
    background.add_task(uploads.remove_left, context.storage, folder)


@router.head("/{step}/files/{name:path}", include_in_schema=False)
@router.get(
    "/{step}/files/{name:path}",
    summary="Download a file of a checkpoint",
    response_class=Response,
    responses={
        **documented(
            "400 range_malformed", *MISSING, "404 file_not_found", 416, "500 checkpoint_damaged", *STORAGE_ERRORS
        ),
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "The part that `Range` asked for."},
    },
)
def download(job_id: str, step: Which, name: str, context: ContextDep, caller: CallerDep) -> Response:
    """The bytes. `Range` and `If-Range` work; `ETag` is the SHA-256 in hex, `Repr-Digest` the same by RFC 9530."""
    with database.reading(context.engine, caller.tenant) as session:  # over before the store is asked, which may hang
        checkpoint = checkpoints.get(session, jobs.get(session, job_id), step)
    record = checkpoints.file_of(checkpoint, name)
    path = f"{checkpoint.path}/{record['name']}"
    return Download(context.storage, path, record["name"], record["bytes"], record["sha256"])
