"""Errors as people read them: a page, or where a script of a page asked, a message in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import Scope

from api.web.pages import page

LOGIN = "/ui/login"


def response(scope: Scope, problem: dict[str, Any], headers: Mapping[str, str]) -> Response:
    """The answer with these problem details. Who has no session is sent to log in, and back afterwards."""
    request = Request(scope)
    from_script = request.headers.get("hx-request") == "true"
    answer: Response
    if problem["status"] == 401:
        if from_script:
            page_of_script = urlsplit(request.headers.get("hx-current-url", "/"))
            return Response(status_code=401, headers={"HX-Redirect": _login(page_of_script.path, page_of_script.query)})
        return RedirectResponse(_login(scope["path"], scope["query_string"].decode("latin-1")), 303)
    if from_script:
        answer = page(request, "message.html", problem["status"], problem=problem)
        answer.headers.update({"HX-Retarget": "#messages", "HX-Reswap": "innerHTML"})
    else:
        answer = page(request, "problem.html", problem["status"], problem=problem)
    answer.headers.update(headers)
    return answer


def _login(path: str, query: str) -> str:
    """Where to log in, from where one goes on to this page."""
    back = f"{path}?{query}" if query else path
    return f"{LOGIN}?{urlencode({'next': back})}" if back not in ("", "/") else LOGIN
