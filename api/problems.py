"""Every error as RFC 9457 problem details that also carry OpenAI's nested `error`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from api import web
from api.web import problem_page

MEDIA_TYPE = "application/problem+json"
MAX_SHOWN = 200
"""The longest piece of a client's input in an answer, in characters."""
MAX_FIELD_ERRORS = 10
MAX_PROBLEM_BYTES = 8_000


class NestedError(BaseModel):
    """The same error in the shape that OpenAI's clients read."""

    message: str
    type: str = Field(description="`invalid_request_error` or `server_error`.")
    code: str
    param: str | None = None


class Problem(BaseModel):
    """RFC 9457. Further members depend on `code`."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="A URN that ends in the code.")
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable; what a program should look at.")
    request_id: str | None = None
    error: NestedError


def shown(text: object) -> str:
    """A client's text cut to `MAX_SHOWN` characters, in ASCII: what is in it can break no encoder."""
    safe = str(text)[:MAX_SHOWN].encode("ascii", "backslashreplace").decode("ascii").replace("\0", "\\x00")
    return safe if len(safe) <= MAX_SHOWN else safe[: MAX_SHOWN - 3] + "..."


def problem_response(
    scope: Scope,
    status: int,
    code: str,
    detail: str,
    *,
    fields: Mapping[str, Any] | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The answer to a request that failed; `fields` are its further members."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {**(headers or {}), **_retry_advice(status, code, headers or {})}
    param = None if param is None else shown(param)  # the name of a field may be the client's own
    body = {
        "type": f"urn:slimtune:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": scope.get("state", {}).get("request_id"),
        "error": {"message": detail, "type": kind, "code": code, "param": param},
    }
    body = _short(fields or {}, MAX_PROBLEM_BYTES - len(json.dumps(body))) | body
    if web.is_page(scope["path"]) and Headers(scope=scope).get("accept") != "application/json":
        return problem_page.response(scope, body, headers)
    return Response(json.dumps(body, allow_nan=False).encode(), status, headers, MEDIA_TYPE)


def _short(fields: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    """The members with texts of at most `MAX_SHOWN` characters, and with the beginning of lists that are too long."""
    kept = {name: _cut(value) for name, value in fields.items()}
    while kept and len(json.dumps(kept, allow_nan=False)) > max_bytes:
        name, longest = max(kept.items(), key=lambda item: len(json.dumps(item[1])))
        if not isinstance(longest, list) or len(longest) < 2:
            del kept[name]
        else:
            kept[name] = longest[: len(longest) // 2]
    return kept


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 3] + "..."
    if isinstance(value, Mapping):
        return {_cut(name): _cut(item) for name, item in value.items()}
    return [_cut(item) for item in value] if isinstance(value, list | tuple) else value


def field_errors(errors: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The members `errors` and `total_errors` of an invalid request, from (field, message) pairs."""
    listed = [{"field": shown(field), "message": shown(message)} for field, message in errors[:MAX_FIELD_ERRORS]]
    return {"errors": listed, "total_errors": len(errors)}


def _retry_advice(status: int, code: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Whether the same request may be answered otherwise if it is sent again, where OpenAI's clients would try.

    They send again what was answered with these statuses unless this header keeps them from it. Of an error that
    nobody foresaw nothing is known.
    """
    if (status not in (408, 409, 429) and status < 500) or code == "internal_error":
        return {}
    may_help = status == 408 or any(name.lower() == "retry-after" for name in headers)
    return {"X-Should-Retry": "true" if may_help else "false"}


REASONS = {
    400: "The body could not be read.",
    401: "There is no valid API key in the request.",
    403: "The operator does not allow it: without API keys only the service's own machine may ask.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "The state of the resource does not allow this.",
    413: "The body is too large.",
    416: "The range lies outside the file.",
    422: "The request is not valid, or cannot be met as it stands; the body says what would help.",
    429: "More than is allowed at once, or in a minute.",
    431: "Path, query and headers are too large.",
    500: "Something went wrong on the server's side.",
    501: "This installation cannot do it.",
    503: "The database cannot be reached.",
    507: "There is no space left to store the file.",
}


DEFAULT_CODES = {
    400: "malformed_body",
    401: "unauthorized",
    403: "keys_required",
    404: "not_found",
    408: "body_stalled",
    409: "job_state_conflict",
    413: "body_too_large",
    416: "range_not_satisfiable",
    422: "invalid_request",
    429: "rate_limited",
    431: "head_too_large",
    500: "internal_error",
    501: "generate_unavailable",
    503: "database_unavailable",
    507: "disk_full",
}
"""Of a status that a route documents without a code."""

STORAGE_ERRORS = ("503 storage_unavailable", "503 storage_denied")
"""What a route that reads or changes files documents."""


def documented(*errors: int | str) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of its errors: a status and a code each, `"404 dataset_not_found"`, or a status
    alone for the code that it has most often. api/openapi.py adds those that every route has.
    """
    responses: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        status, _, code = str(error).partition(" ")
        document_problem(responses, int(status), int(status), code)
    return responses


def document_problem(responses: dict[Any, dict[str, Any]], key: int | str, status: int, code: str = "") -> None:
    """Add one to the responses of a route, under this key. Its example is among the document's components."""
    schema = {"$ref": "#/components/schemas/Problem"}
    response = responses.setdefault(key, {"description": REASONS[status]})
    content = response.setdefault("content", {}).setdefault(MEDIA_TYPE, {"schema": schema})
    code = code or DEFAULT_CODES[status]
    content.setdefault("examples", {})[code] = {"$ref": f"#/components/examples/{code}"}
