"""What clients ask of jobs, whatever shape they ask in: create, cancel, pause, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import BackgroundTasks
from sqlalchemy.orm import Session
from starlette.responses import Response

from api import workload
from api.dependencies import Context
from api.problems import STORAGE_ERRORS
from api.schemas import JobRequest, ResumeRequest
from service import idempotency, jobs, tracing
from service.models import Job

REPLAYED = "Idempotency-Replayed"
CREATED_HEADERS: dict[str, Any] = {
    "Location": {"description": "The job.", "schema": {"type": "string"}},
    REPLAYED: {
        "description": "`true` if the key came before: this is the answer of then.",
        "schema": {"type": "string"},
    },
}
"""Of the answer to a creation, for the OpenAPI document."""


CREATION_ERRORS = (
    400,
    "404 dataset_not_found",
    "404 model_not_found",
    "404 tokenizer_not_found",
    "409 dataset_not_tokenized",
    "409 tokenizer_not_ready",
    "409 model_not_ready",
    "409 idempotency_key_in_flight",
    "413 storage_quota_exceeded",
    "422 invalid_request",
    "422 memory_cap_infeasible",
    "422 memory_cap_exceeds_device",
    "422 dataset_too_small",
    "422 dataset_unusable",
    "422 tokenizer_failed",
    "422 idempotency_key_reused",
    "429 too_many_jobs",
    *STORAGE_ERRORS,
)
"""What a route that creates jobs documents."""
RESUMPTION_ERRORS = (
    400,
    "404 job_not_found",
    "409 job_state_conflict",
    "422 invalid_request",
    "422 memory_cap_infeasible",
    "422 memory_cap_exceeds_device",
)
"""What a route that resumes jobs documents."""


@dataclass(frozen=True, slots=True)
class Creation:
    """A request for a job, in the shape that it came in."""

    asked: dict[str, Any]
    """What the Idempotency-Key stands for: the request without its defaults, so that a release that adds a field does
    not make another request of one that is sent again."""
    request: Callable[[], JobRequest]
    """What is to be made of it. Called once, and only if there is no job yet."""
    answer: Callable[[Job], str]
    """The body of the answer, as JSON."""
    location: str
    """Path of the jobs of this shape."""


def create(
    creation: Creation,
    session: Session,
    context: Context,
    background: BackgroundTasks,
    request_id: str,
    idempotency_key: str | None,
    status: int = 202,
) -> Response:
    """Plan a job under its memory cap and queue it, or answer as before if the key came with this request before.

    Raises what workload.resolve, service.jobs.create and service.idempotency.once raise.
    """

    def new_job() -> idempotency.Created:
        job = _new_job(session, creation.request(), context, request_id)
        return idempotency.Created(job.id, creation.answer(job))

    created = idempotency.once(session, idempotency_key, creation.asked, new_job)
    # Background tasks run after the answer, so after the commit: no worker looks for a row that is not there yet.
    # For a job that waits no more the message is a look for work, as any other.
    background.add_task(context.waker.wake, created.job_id)
    headers = {"Location": f"{creation.location}/{created.job_id}"} | ({REPLAYED: "true"} if created.replayed else {})
    return Response(created.answer, status, headers, "application/json")


def _new_job(session: Session, request: JobRequest, context: Context, request_id: str) -> Job:
    with tracing.span("plan"):
        planned = workload.resolve(session, request, context.storage)
    with tracing.span("create job") as span:
        job = jobs.create(
            session,
            spec=request.model_dump(mode="json"),
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
        span.set({"slimtune.job.id": job.id})
    return job


def resume(
    session: Session, job_id: str, request: ResumeRequest | None, context: Context, background: BackgroundTasks
) -> Job:
    """Queue a paused job again, or take back a pause that has not happened yet; with a `memory_cap`, planned anew.

    Raises what service.jobs.request, workload.check_device and workload.replan raise.
    """
    if request is None or request.memory_cap is None:
        workload.check_device(session, jobs.get(session, job_id))
    job = jobs.request(session, job_id, "resume", _new_cap(session, request))
    if job.status == "queued":
        background.add_task(context.waker.wake, job_id)
    return job


def _new_cap(session: Session, request: ResumeRequest | None) -> Callable[[Job], jobs.NewCap] | None:
    if request is None or request.memory_cap is None:
        return None
    memory_cap = request.memory_cap
    return lambda job: jobs.NewCap(memory_cap, workload.replan(session, job, memory_cap).to_json())
