"""GET /docs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import HTMLResponse, Response

from api.reference.pages import page

router = APIRouter(include_in_schema=False)

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-cache",
}
"""It loads nothing: its style is in it, and there are no scripts."""


@dataclass(frozen=True, slots=True)
class _Made:
    html: str
    tag: str


@router.get("/docs")
def reference(request: Request) -> Response:
    """The document of this service for people, made at the first request."""
    made = _made(request.app)
    headers = {**HEADERS, "ETag": made.tag}
    if request.headers.get("if-none-match") == made.tag:
        return Response(status_code=304, headers=headers)
    return HTMLResponse(made.html, headers=headers)


def _made(app: FastAPI) -> _Made:
    made: _Made | None = getattr(app.state, "reference", None)
    if made is None:
        html = page(app.openapi())
        made = _Made(html, f'"{hashlib.sha256(html.encode()).hexdigest()[:32]}"')
        app.state.reference = made
    return made
