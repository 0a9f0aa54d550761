"""Jobs: the list."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from api.dependencies import CallerDep, ContextDep
from api.responses import JobSummary
from api.web import gauges
from api.web.pages import page
from service import database, jobs
from service.status import JobStatus

router = APIRouter(include_in_schema=False)

PAGE = 25


@router.get("/")
def listed(
    request: Request,
    context: ContextDep,
    caller: CallerDep,
    status: JobStatus | None = None,
    after: Annotated[str | None, Query(pattern="^job_[0-9a-f]{32}$")] = None,
) -> Response:
    with database.reading(context.engine, caller.tenant) as session:
        rows, has_more = jobs.page(session, status, after, PAGE)
        counts = jobs.unfinished(session)
    shown = [JobSummary.of_row(row) for row in rows]
    asked = {name: value for name, value in (("status", status), ("after", after)) if value is not None}
    from_script = request.headers.get("hx-request") == "true"
    return page(
        request,
        "jobs_list.html" if from_script else "jobs.html",
        jobs=[(job, gauges.small(job)) for job in shown],
        has_more=has_more,
        chosen=status,
        after=after,
        counts=counts,
        states=list(JobStatus),
        here="/?" + urlencode(asked) if asked else "/",
    )
