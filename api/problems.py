"""Every error as RFC 9457 problem details that also carry OpenAI's nested `error`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
MAX_SHOWN = 200
"""The longest piece of a client's input in an answer, in characters."""
MAX_FIELD_ERRORS = 10


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
    body = {
        **(fields or {}),
        "type": f"urn:slimtune:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": scope.get("state", {}).get("request_id"),
        "error": {"message": detail, "type": kind, "code": code, "param": param},
    }
    return Response(json.dumps(body, allow_nan=False).encode(), status, headers, MEDIA_TYPE)


def field_errors(errors: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The members `errors` and `total_errors` of an invalid request, from (field, message) pairs."""
    listed = [{"field": shown(field), "message": shown(message)} for field, message in errors[:MAX_FIELD_ERRORS]]
    return {"errors": listed, "total_errors": len(errors)}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of its errors."""
    reasons = {
        400: "The body could not be read.",
        401: "There is no valid API key in the request.",
        403: "The service runs without API keys, and this does not come from its own machine.",
        404: "There is no such thing.",
        408: "The upload stalled.",
        409: "The state of the resource does not allow this.",
        413: "The body is too large.",
        416: "The range lies outside the file.",
        422: "The request is not valid, or cannot be met as it stands; the body says what would help.",
        429: "More than is allowed at once, or in a minute.",
        500: "Something went wrong on the server's side.",
        501: "This installation cannot do it.",
        503: "The database cannot be reached.",
        507: "There is no space left to store the file.",
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": reasons[status], "content": {MEDIA_TYPE: {"schema": schema}}} for status in statuses
    }
