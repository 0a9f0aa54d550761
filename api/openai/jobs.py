"""Fine-tuning jobs in OpenAI's shape."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Body, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from api import job_requests
from api.dependencies import ContextDep, RequestId, SessionDep
from api.errors import InvalidRequestError
from api.openai.paging import Limit, page_size
from api.openai.requests import JOB_EXAMPLES, CreateJobRequest
from api.openai.responses import (
    CHECKPOINT_PREFIX,
    EVENT_PREFIX,
    FineTuningJob,
    JobCheckpointObject,
    JobEventObject,
    ListOf,
    list_of,
)
from api.openai.translation import in_openai_names, to_job
from api.problems import documented
from api.schemas import RESUME_EXAMPLES, IdempotencyKey, ResumeRequest
from service import checkpoints, events, jobs, metrics, result_files
from service.models import Job
from service.status import Action

router = APIRouter(prefix="/fine_tuning/jobs")

MAX_METADATA_FILTERS = 16
_METADATA = re.compile(r"metadata\[([^\]\0]{1,64})\]")
METADATA_PARAMETER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs with these pairs: `metadata[team]=support`; `metadata=null` for those with none.",
            "schema": {
                "type": "object",
                "maxProperties": MAX_METADATA_FILTERS,
                "propertyNames": {"pattern": r"^[^\]\x00]{1,64}$"},
                "additionalProperties": {"type": "string", "maxLength": 512, "pattern": r"^[^\x00]*$"},
            },
            "example": {"team": "support"},
        }
    ]
}
JobId = Annotated[str, Query(pattern="^job_[0-9a-f]{32}$", description="The last id of the page before.")]


@router.post(
    "",
    response_model=FineTuningJob,
    summary="Create a fine-tuning job",
    responses=documented(*job_requests.CREATION_ERRORS) | {200: {"headers": job_requests.CREATED_HEADERS}},
)
def create(
    request: Annotated[CreateJobRequest, Body(openapi_examples=JOB_EXAMPLES)],
    session: SessionDep,
    context: ContextDep,
    background: BackgroundTasks,
    request_id: RequestId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Plan the job under its memory cap and queue it, as POST /jobs does. `memory_cap` is required.

    OpenAI's client sends a request again whose answer was lost, and no `Idempotency-Key` by itself: give one
    (`extra_headers`), and there will be one job.
    """
    creation = job_requests.Creation(
        asked={"openai": request.model_dump(mode="json", exclude_defaults=True)},
        request=lambda: to_job(session, request),
        answer=lambda job: FineTuningJob.of_row(job, None).model_dump_json(),
        location="/v1/fine_tuning/jobs",
    )
    with in_openai_names():
        return job_requests.create(creation, session, context, background, request_id, idempotency_key, status=200)


@router.get("", summary="List fine-tuning jobs", responses=documented(422), openapi_extra=METADATA_PARAMETER)
def list_page(
    request: Request, session: SessionDep, after: JobId | None = None, limit: Limit = 20
) -> ListOf[FineTuningJob]:
    """Newest first."""
    rows, has_more = jobs.page(session, None, after, page_size(limit), _metadata_filter(request))
    finals = result_files.finals(session, rows)
    return list_of([FineTuningJob.of_row(row, finals.get(row.id)) for row in rows], has_more)


def _metadata_filter(request: Request) -> dict[str, str] | None:
    """What `metadata[key]=value` asks for; {} for `metadata=null`. Raises InvalidRequestError."""
    wanted: dict[str, str] = {}
    none_at_all = False
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            none_at_all = True
        elif match := _METADATA.fullmatch(name):
            wanted[match[1]] = value
        elif name.startswith("metadata"):
            raise InvalidRequestError(("metadata", "must be metadata[key]=value, with keys of 1 to 64 characters"))
    if len(wanted) > MAX_METADATA_FILTERS or (wanted and none_at_all):
        raise InvalidRequestError(("metadata", f"must be null, or at most {MAX_METADATA_FILTERS} pairs"))
    if any("\0" in text for text in wanted.values()):
        raise InvalidRequestError(("metadata", "must not contain NUL characters"))
    return wanted or ({} if none_at_all else None)


@router.get("/{job_id}", summary="Get a fine-tuning job", responses=documented("404 job_not_found"))
def get(job_id: str, session: SessionDep) -> FineTuningJob:
    return _answer(session, jobs.get(session, job_id))


@router.post("/{job_id}/cancel", summary="Cancel a fine-tuning job", responses=documented("404 job_not_found", 409))
def cancel(job_id: str, session: SessionDep) -> FineTuningJob:
    """At once if it waits; a running job stops within seconds. Asking twice is fine."""
    return _request(session, job_id, "cancel")


@router.post("/{job_id}/pause", summary="Pause a fine-tuning job", responses=documented("404 job_not_found", 409))
def pause(job_id: str, session: SessionDep) -> FineTuningJob:
    """A running job writes a checkpoint first and goes on from it when resumed. A paused job is `queued` in OpenAI's
    words, with `paused: true`."""
    return _request(session, job_id, "pause")


@router.post(
    "/{job_id}/resume",
    summary="Resume a paused fine-tuning job",
    responses=documented(*job_requests.RESUMPTION_ERRORS),
)
def resume(
    job_id: str,
    session: SessionDep,
    context: ContextDep,
    background: BackgroundTasks,
    request: Annotated[ResumeRequest | None, Body(openapi_examples=RESUME_EXAMPLES)] = None,
) -> FineTuningJob:
    """Queue a paused job again; with a `memory_cap` (`extra_body`), planned anew under it."""
    return _answer(session, job_requests.resume(session, job_id, request, context, background))


def _request(session: Session, job_id: str, action: Action) -> FineTuningJob:
    return _answer(session, jobs.request(session, job_id, action))


def _answer(session: Session, job: Job) -> FineTuningJob:
    return FineTuningJob.of_row(job, result_files.finals(session, [job]).get(job.id))


@router.get(
    "/{job_id}/events", summary="List a fine-tuning job's events", responses=documented("404 job_not_found", 422)
)
def list_events(
    job_id: str,
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern=f"^{EVENT_PREFIX}[0-9]{{1,18}}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> ListOf[JobEventObject]:
    """Newest first."""
    before = None if after is None else int(after.removeprefix(EVENT_PREFIX))
    rows, has_more = events.newest(session, job_id, before, page_size(limit))
    return list_of([JobEventObject.of_row(row) for row in rows], has_more)


@router.get(
    "/{job_id}/checkpoints",
    summary="List a fine-tuning job's checkpoints",
    responses=documented("404 job_not_found", 422),
)
def list_checkpoints(
    job_id: str,
    session: SessionDep,
    after: Annotated[
        str | None,
        Query(
            pattern=f"^{CHECKPOINT_PREFIX}[0-9a-f]{{32}}_[0-9]{{1,18}}$", description="The last id of the page before."
        ),
    ] = None,
    limit: Limit = 10,
) -> ListOf[JobCheckpointObject]:
    """Those that are kept, newest first."""
    job = jobs.get(session, job_id)
    rows = checkpoints.page(session, job.id)
    if after is not None:
        rows = [row for row in rows if row.step < int(after.rpartition("_")[2])]
    size = page_size(limit)
    page, has_more = rows[:size], len(rows) > size
    losses = metrics.losses_at(session, job.id, [row.step for row in page])
    final = result_files.finals(session, [job]).get(job.id)
    output = None if final is None else final.step
    answers = [
        JobCheckpointObject.of_row(row, losses.get(row.step), job.output_model_id if row.step == output else None)
        for row in page
    ]
    return list_of(answers, has_more)
