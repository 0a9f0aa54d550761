"""Jobs: create, look, steer."""

from __future__ import annotations

import csv
import io
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Body, Header, Query, Request, Response

from api import job_requests, sse
from api.dependencies import CallerDep, ContextDep, Limit, RequestId, SessionDep
from api.event_stream import EventStream
from api.problems import documented
from api.responses import EventResponse, JobResponse, JobSummary, MetricResponse, Page
from api.schemas import INTEGER_END, JOB_EXAMPLES, RESUME_EXAMPLES, IdempotencyKey, JobRequest, ResumeRequest
from service import database, deletions, events, jobs, metrics, uploads
from service.status import TERMINAL

router = APIRouter(prefix="/jobs", tags=["jobs"])

CSV_COLUMNS = tuple(MetricResponse.model_fields)

STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": sse.DOCUMENTED},
    204: {"description": "The job is over, and `Last-Event-ID` says that the stream was read to its end."},
}


@router.post(
    "",
    status_code=202,
    response_model=JobResponse,
    summary="Create a job",
    responses=documented(*job_requests.CREATION_ERRORS) | {202: {"headers": job_requests.CREATED_HEADERS}},
)
def create(
    request: Annotated[JobRequest, Body(openapi_examples=JOB_EXAMPLES)],
    session: SessionDep,
    context: ContextDep,
    background: BackgroundTasks,
    request_id: RequestId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Plan the job under its memory cap and queue it. The answer has the plan; `Location` is where to watch.

    With an `Idempotency-Key` a request whose answer was lost can be sent again: there will be one job.
    """
    creation = job_requests.Creation(
        asked=request.model_dump(mode="json", exclude_defaults=True),
        request=lambda: request,
        answer=lambda job: JobResponse.of_row(job).model_dump_json(),
        location="/jobs",
    )
    return job_requests.create(creation, session, context, background, request_id, idempotency_key)


@router.get("", summary="List jobs", responses=documented(422))
def list_page(
    context: ContextDep,
    caller: CallerDep,
    status: Annotated[
        Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"] | None,
        Query(description="Only jobs in this state."),
    ] = None,
    after: Annotated[
        str | None, Query(pattern="^job_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[JobSummary]:
    """Newest first. A plan's `frontier` is left out: it is most of a job's bytes, and `GET /jobs/{id}` has it."""
    with database.reading(context.engine, caller.tenant) as session:
        rows, has_more = jobs.page(session, status, after, limit)
    return Page[JobSummary](data=[JobSummary.of_row(row) for row in rows], has_more=has_more)


@router.get("/{job_id}", response_model=JobResponse, summary="Get a job", responses=documented("404 job_not_found"))
async def get(job_id: str, context: ContextDep, caller: CallerDep) -> Response:
    job = JobResponse.of_row(await context.looks.job(caller.tenant, job_id))
    return Response(job.model_dump_json(), media_type="application/json")


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete a job",
    responses=documented("404 job_not_found", "409 job_unfinished", "409 model_in_use"),
)
def delete(job_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """One that is over, with its metrics, events, checkpoints and logs, and with the model that is its output: refused
    while a job that is not finished starts from that."""
    folder = deletions.delete_job(session, job_id)
    uploads.leave(context.storage, folder)
    background.add_task(uploads.remove_left, context.storage, folder)


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=documented("404 job_not_found", 409))
def cancel(job_id: str, session: SessionDep) -> JobResponse:
    """At once if it waits; a running job stops within seconds. Asking twice is fine."""
    return JobResponse.of_row(jobs.request(session, job_id, "cancel"))


@router.post("/{job_id}/pause", summary="Pause a job", responses=documented("404 job_not_found", 409))
def pause(job_id: str, session: SessionDep) -> JobResponse:
    """A running job writes a checkpoint first and goes on from it when resumed."""
    return JobResponse.of_row(jobs.request(session, job_id, "pause"))


@router.post(
    "/{job_id}/resume",
    summary="Resume a paused job",
    responses=documented(*job_requests.RESUMPTION_ERRORS),
)
def resume(
    job_id: str,
    session: SessionDep,
    context: ContextDep,
    background: BackgroundTasks,
    request: Annotated[ResumeRequest | None, Body(openapi_examples=RESUME_EXAMPLES)] = None,
) -> JobResponse:
    """Queue a paused job again, or take back a pause that has not happened yet.

    With a `memory_cap` a paused job is planned anew under it and goes on from its checkpoint: the chunks change,
    the loss curve does not.
    """
    return JobResponse.of_row(job_requests.resume(session, job_id, request, context, background))


@router.get(
    "/{job_id}/metrics",
    response_model=Page[MetricResponse],
    summary="Get the loss curve",
    responses={**documented("404 job_not_found", 422), 200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
def list_metrics(
    job_id: str,
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    after_step: Annotated[int, Query(ge=-1, lt=INTEGER_END, description="Only later steps.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="The most rows to answer.")] = 1_000,
) -> Any:
    """One row per optimiser step, by step; as CSV if `Accept` says `text/csv`."""
    with database.reading(context.engine, caller.tenant) as session:
        rows, has_more = metrics.page(session, job_id, after_step, limit)
    if "text/csv" not in request.headers.get("accept", ""):
        return {"data": rows, "has_more": has_more}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    writer.writerows([getattr(row, column) for column in CSV_COLUMNS] for row in rows)
    return Response(text.getvalue(), media_type="text/csv")


@router.get(
    "/{job_id}/events",
    response_model=Page[EventResponse],
    summary="List or watch events",
    responses=documented("404 job_not_found", 422, "429 too_many_streams") | STREAM,
)
def list_events(
    job_id: str,
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    after: Annotated[int, Query(ge=0, lt=INTEGER_END, description="Only events with a higher id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1_000, description="The most events to answer in a list.")] = 100,
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            pattern=r"^([0-9]{1,19}(\.end)?)?$",
            description="Of a stream that broke off: what it goes on after, in place of `after`.",
        ),
    ] = None,
) -> Any:
    """What happened to the job, oldest first.

    As a stream of events if `Accept` says `text/event-stream`: what there is, then what comes, until the job is over.
    The last event is `end` with the job's `status`; who comes back after it is answered 204.
    """
    with database.reading(context.engine, caller.tenant) as session:
        if not sse.is_wanted(request.headers.get("accept", "")):
            rows, has_more = events.page(session, job_id, after, limit)
            return {"data": rows, "has_more": has_more}
        status, newest = events.stand(session, job_id)
    number, dot, _ = (last_event_id or str(after)).partition(".")
    if dot and status in TERMINAL:
        return Response(status_code=204)
    heartbeat_seconds = context.settings.event_heartbeat_seconds
    return EventStream(context.event_hub, caller.tenant, job_id, int(number), newest, heartbeat_seconds)
