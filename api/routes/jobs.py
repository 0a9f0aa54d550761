"""Jobs: create, look, steer."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Body, Query, Request, Response
from sqlalchemy.orm import Session

from api import workload
from api.dependencies import ContextDep, Limit, RequestId, SessionDep
from api.problems import documented
from api.responses import EventResponse, JobResponse, JobSummary, MetricResponse, Page
from api.schemas import INTEGER_END, JOB_EXAMPLES, RESUME_EXAMPLES, IdempotencyKey, JobRequest, ResumeRequest
from service import events, idempotency, jobs, metrics, queue
from service import models as rows
from service.status import Action

router = APIRouter(prefix="/jobs", tags=["jobs"])

CSV_COLUMNS = tuple(MetricResponse.model_fields)
REPLAYED = "Idempotency-Replayed"
CREATED: dict[int | str, dict[str, Any]] = {
    202: {
        "headers": {
            "Location": {"description": "The job.", "schema": {"type": "string"}},
            REPLAYED: {
                "description": "`true` if the key came before: this is the answer of then.",
                "schema": {"type": "string"},
            },
        }
    }
}


@router.post(
    "",
    status_code=202,
    response_model=JobResponse,
    summary="Create a job",
    responses=documented(
        400,
        "404 dataset_not_found",
        "404 model_not_found",
        "404 tokenizer_not_found",
        "409 dataset_not_tokenized",
        "409 tokenizer_not_ready",
        "409 model_not_ready",
        "409 idempotency_key_in_flight",
        "422 invalid_request",
        "422 memory_cap_infeasible",
        "422 memory_cap_exceeds_device",
        "422 dataset_too_small",
        "422 dataset_unusable",
        "422 tokenizer_failed",
        "422 idempotency_key_reused",
    )
    | CREATED,
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
    spec = request.model_dump(mode="json")

    def new_job() -> idempotency.Created:
        planned = workload.resolve(session, request, context.storage)
        job = jobs.create(
            session,
            spec=spec,
            train=planned.train.to_json(),
            model_config=planned.model.to_json(),
            plan=planned.plan.to_json(),
            memory_cap_bytes=request.memory_cap,
            dataset_id=request.dataset,
            validation_dataset_id=request.validation_dataset,
            base_model_id=planned.base_model_id,
            tokenizer=planned.tokenizer,
            request_id=request_id,
        )
        return idempotency.Created(job.id, JobResponse.of_row(job).model_dump_json())

    # Without defaults: a release that adds a field must not make another request of one that is sent again.
    asked = request.model_dump(mode="json", exclude_defaults=True)
    created = idempotency.once(session, idempotency_key, asked, new_job)
    # Background tasks run after the answer, so after the commit: no worker looks for a row that is not there yet.
    # For a job that waits no more the message is a look for work, as any other.
    background.add_task(queue.wake, created.job_id, context.producer)
    headers = {"Location": f"/jobs/{created.job_id}"} | ({REPLAYED: "true"} if created.replayed else {})
    return Response(created.answer, 202, headers, "application/json")


@router.get("", summary="List jobs", responses=documented(422))
def list_page(
    session: SessionDep,
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
    rows, has_more = jobs.page(session, status, after, limit)
    return Page[JobSummary](data=[JobSummary.of_row(row) for row in rows], has_more=has_more)


@router.get("/{job_id}", summary="Get a job", responses=documented("404 job_not_found"))
def get(job_id: str, session: SessionDep) -> JobResponse:
    return JobResponse.of_row(jobs.get(session, job_id))


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=documented("404 job_not_found", 409))
def cancel(job_id: str, session: SessionDep) -> JobResponse:
    """At once if it waits; a running job stops within seconds. Asking twice is fine."""
    return _request(session, job_id, "cancel")


@router.post("/{job_id}/pause", summary="Pause a job", responses=documented("404 job_not_found", 409))
def pause(job_id: str, session: SessionDep) -> JobResponse:
    """A running job writes a checkpoint first and goes on from it when resumed."""
    return _request(session, job_id, "pause")


@router.post(
    "/{job_id}/resume",
    summary="Resume a paused job",
    responses=documented(
        400, "404 job_not_found", 409, 422, "422 memory_cap_infeasible", "422 memory_cap_exceeds_device"
    ),
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
    if request is None or request.memory_cap is None:
        workload.check_device(session, jobs.get(session, job_id))
    job = _request(session, job_id, "resume", _new_cap(session, request))
    if job.status == "queued":
        background.add_task(queue.wake, job_id, context.producer)
    return job


def _new_cap(session: Session, request: ResumeRequest | None) -> Callable[[rows.Job], jobs.NewCap] | None:
    if request is None or request.memory_cap is None:
        return None
    memory_cap = request.memory_cap
    return lambda job: jobs.NewCap(memory_cap, workload.replan(session, job, memory_cap).to_json())


def _request(
    session: Session, job_id: str, action: Action, new_cap: Callable[[rows.Job], jobs.NewCap] | None = None
) -> JobResponse:
    return JobResponse.of_row(jobs.request(session, job_id, action, new_cap))


@router.get(
    "/{job_id}/metrics",
    response_model=Page[MetricResponse],
    summary="Get the loss curve",
    responses={**documented("404 job_not_found", 422), 200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
def list_metrics(
    job_id: str,
    request: Request,
    session: SessionDep,
    after_step: Annotated[int, Query(ge=-1, lt=INTEGER_END, description="Only later steps.")] = -1,
    limit: Annotated[int, Query(ge=1, le=10_000, description="The most rows to answer.")] = 1_000,
) -> Any:
    """One row per optimiser step, by step; as CSV if `Accept` says `text/csv`."""
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
    summary="List events",
    responses=documented("404 job_not_found", 422),
)
def list_events(
    job_id: str,
    session: SessionDep,
    after: Annotated[int, Query(ge=0, lt=INTEGER_END, description="Only events with a higher id.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1_000, description="The most events to answer.")] = 100,
) -> dict[str, Any]:
    """What happened to the job, oldest first."""
    rows, has_more = events.page(session, job_id, after, limit)
    return {"data": rows, "has_more": has_more}
