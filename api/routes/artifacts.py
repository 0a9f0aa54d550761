"""The loss curve of a job as files for other tools."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import StreamingResponse

from api.dependencies import CallerDep, ContextDep
from api.problems import documented
from api.responses import ArtifactResponse, Page
from service import artifacts, database

router = APIRouter(prefix="/jobs/{job_id}/artifacts", tags=["jobs"])

Name = Annotated[str, Path(description="One of the list.")]


@router.get("", summary="List artifacts", responses=documented("404 job_not_found"))
def list_all(job_id: str, context: ContextDep, caller: CallerDep) -> Page[ArtifactResponse]:
    """`metrics.csv` and a file of events for TensorBoard; also of a job that runs."""
    with database.reading(context.engine, caller.tenant) as session:
        found = artifacts.listed(session, job_id)
    return Page[ArtifactResponse](data=[ArtifactResponse.model_validate(each) for each in found], has_more=False)


@router.get(
    "/{artifact}",
    summary="Download an artifact",
    response_class=StreamingResponse,
    responses={
        **documented("404 job_not_found", "404 file_not_found"),
        200: {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                "text/csv": {"schema": {"type": "string"}},
            }
        },
    },
)
def download(job_id: str, artifact: Name, context: ContextDep, caller: CallerDep) -> StreamingResponse:
    """The steps so far, made as it is sent: there is no `Content-Length`, and no `Range`."""
    with database.reading(context.engine, caller.tenant) as session:
        found = artifacts.get(session, job_id, artifact)
    headers = {"Content-Disposition": f'attachment; filename="{found.name}"', "Cache-Control": "no-store"}
    pieces = artifacts.content(context.engine, caller.tenant, found)
    return StreamingResponse(pieces, headers=headers, media_type=found.media_type)
