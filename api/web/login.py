"""In and out: a session in exchange for an API key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from api import browsers, local_only
from api.authentication import Authenticator
from api.callers import Caller
from api.dependencies import ContextDep
from api.errors import CrossSiteError, RateLimitedError, UnauthorizedError
from api.web.pages import page
from service import database, web_sessions

router = APIRouter(prefix="/ui", include_in_schema=False)


@router.get("/login")
async def form(request: Request, next: str = "/") -> Response:  # noqa: A002  # as the address has it
    if request.app.state.authenticator is None:
        return RedirectResponse("/", 303)
    return page(request, "login.html", next=_below(next), error=None)


@router.post("/login")
async def log_in(
    request: Request,
    context: ContextDep,
    key: Annotated[str, Form(max_length=200)],
    next: Annotated[str, Form(max_length=2_000)] = "/",  # noqa: A002
) -> Response:
    authenticator: Authenticator | None = request.app.state.authenticator
    if authenticator is None:
        return RedirectResponse("/", 303)
    if local_only.from_another_site(request.headers):
        raise CrossSiteError
    try:
        caller = await authenticator.owner(request.scope, key.strip())
    except (UnauthorizedError, RateLimitedError) as error:
        return page(request, "login.html", error.status, next=_below(next), error=error.message)
    token = await run_in_threadpool(_begin, context, caller)
    answer = RedirectResponse(_below(next), 303)
    answer.set_cookie(
        browsers.COOKIE,
        token,
        max_age=web_sessions.HOURS * 3_600,
        httponly=True,
        samesite="strict",
        secure="https" in (request.url.scheme, request.headers.get("x-forwarded-proto")),
    )
    return answer


@router.post("/logout")
async def log_out(request: Request, context: ContextDep) -> Response:
    """The session is over, also for who has a copy of its token."""
    token = browsers.session_token(request.headers)
    if token is not None and request.app.state.authenticator is not None:
        await run_in_threadpool(_end, context, token)
        request.app.state.authenticator.forget(token)
    answer = Response(status_code=204, headers={"HX-Redirect": "/ui/login"})
    answer.delete_cookie(browsers.COOKIE, httponly=True, samesite="strict")
    return answer


def _begin(context: ContextDep, caller: Caller) -> str:
    assert caller.key_id is not None  # noqa: S101  # an authenticator's callers have keys
    with database.transaction(context.engine) as session:
        return web_sessions.begin(session, caller.key_id)


def _end(context: ContextDep, token: str) -> None:
    with database.transaction(context.engine) as session:
        web_sessions.end(session, token)


def _below(path: str) -> str:
    """Where to go on: a page of ours, whatever the address says."""
    return path if path == "/" or path.startswith("/ui/") else "/"
