"""Jobs: the list."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.dependencies import CallerDep, ContextDep
from api.responses import JobSummary
from api.web.pages import page
from service import database, jobs

router = APIRouter(include_in_schema=False)


@router.get("/")
def listed(request: Request, context: ContextDep, caller: CallerDep) -> Response:
    with database.reading(context.engine, caller.tenant) as session:
        rows, has_more = jobs.page(session, None, None, 20)
    return page(request, "jobs.html", jobs=[JobSummary.of_row(row) for row in rows], has_more=has_more)
