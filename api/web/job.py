"""A job: its page, and what the page asks for while the job goes on."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from api.dependencies import CallerDep, ContextDep
from api.responses import CheckpointResponse, JobResponse
from api.schemas import INTEGER_END
from api.web import gauges, timeline
from api.web.pages import page
from service import checkpoints, database, events, jobs, metrics
from service.models import Job, JobEvent
from service.status import REQUESTS, TERMINAL, Desired, JobStatus

router = APIRouter(prefix="/ui/jobs", include_in_schema=False)

EVENTS = 25
"""Of the timeline, before it is asked for more."""
KEPT_EVENTS = 500
"""Of the timeline at the most, where a page is open while they happen."""
POINTS = 2_000
"""Of a curve, about: more than a screen has pixels for."""
_CURVE = TypeAdapter(metrics.Curve)


@router.get("/{job_id}")
def job(
    job_id: str,
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    since: Annotated[int | None, Query(ge=0, lt=INTEGER_END)] = None,
) -> Response:
    """The page; the pieces that change, where its script asks for them. `since`: the oldest event that the page has, so
    that what comes leaves no gap before it."""
    with database.reading(context.engine, caller.tenant) as session:
        values = _values(session, jobs.get(session, job_id), since)
    piece = request.headers.get("hx-request") == "true"
    return page(request, "job_live.html" if piece else "job.html", **values, base_url=str(request.base_url).rstrip("/"))


@router.get("/{job_id}/events")
def older(
    job_id: str,
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    before: Annotated[int, Query(ge=0, lt=INTEGER_END)],
) -> Response:
    """A piece of the timeline: what came before an event."""
    with database.reading(context.engine, caller.tenant) as session:
        rows, more = events.newest(session, job_id, before, 2 * EVENTS)
    return page(request, "job_older.html", job_id=job_id, timeline=timeline.entries(rows), older=more)


@router.get("/{job_id}/curve")
def curve(
    job_id: str,
    context: ContextDep,
    caller: CallerDep,
    first: Annotated[int, Query(ge=0, lt=INTEGER_END)] = 0,
    last: Annotated[int | None, Query(ge=0, lt=INTEGER_END)] = None,
) -> Response:
    """The job's steps as columns of JSON, not more than a chart can show."""
    with database.reading(context.engine, caller.tenant) as session:
        found = metrics.curve(session, job_id, first, last, POINTS)
    return Response(_CURVE.dump_json(found), media_type="application/json", headers={"Cache-Control": "no-store"})


def _newest_events(session: Session, job_id: str, since: int | None) -> tuple[list[JobEvent], bool]:
    """Newest first, and whether there are older ones."""
    if since is not None:
        rows, too_many = events.page(session, job_id, since - 1, KEPT_EVENTS)
        if len(rows) >= EVENTS and not too_many:
            return rows[::-1], events.newest(session, job_id, rows[0].id, 0)[1]
    return events.newest(session, job_id, None, EVENTS)


def _values(session: Session, row: Job, since: int | None) -> dict[str, Any]:
    rows, more = _newest_events(session, row.id, since)
    shown = JobResponse.of_row(row)
    status, desired = JobStatus(row.status), Desired(row.desired)
    return {
        "job": shown,
        "over": status in TERMINAL,
        "can": {action: _changes(action, status, desired) for action in ("pause", "resume", "cancel")},
        "worker": row.worker,
        "device": row.device_id,
        "spec": row.spec,
        "spec_text": json.dumps(row.spec, indent=2, ensure_ascii=False),
        "gauge": gauges.of_job(shown),
        "causes": gauges.breakdown(shown.plan.breakdown),
        "typical_step_seconds": row.typical_step_seconds,
        "checkpoints": [CheckpointResponse.of_row(each) for each in checkpoints.page(session, row.id)],
        "final_step": row.step if status is JobStatus.SUCCEEDED else None,
        "timeline": timeline.entries(rows),
        "older": more,
        "oldest_event": rows[-1].id if rows else 0,
        "event_types": timeline.TYPES,
        "newest_event": rows[0].id if rows else 0,
    }


def _changes(action: Any, status: JobStatus, desired: Desired) -> bool:
    """Whether asking for it would change something."""
    return REQUESTS.get((action, status, desired), (status, desired)) != (status, desired)
