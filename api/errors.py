"""Exceptions to problem details."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import sqlalchemy.exc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from api.problems import field_errors, problem_response
from service.errors import ServiceError
from slim_core.planning import MemoryCapInfeasibleError

logger = logging.getLogger(__name__)

V1_RESOURCES = ["/v1/files", "/v1/uploads", "/v1/fine_tuning/jobs", "/v1/models"]
"""What who looks for another path of OpenAI's API is told of."""
DATABASE_AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
"""What says that the database cannot be reached, or is too busy."""
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
UNION_TAG = "~"
"""First character of the tags of unions in schemas.py: no part of a field's name."""


class InvalidRequestError(ServiceError):
    """A request that is well-formed but breaks a rule between its fields."""

    status = 422
    code = "invalid_request"

    def __init__(self, *errors: tuple[str, str]) -> None:
        super().__init__(_summary(errors), **field_errors(errors))
        self.param = errors[0][0]


class UploadStalledError(ServiceError):
    """No byte of an upload arrived for too long."""

    status = 408
    code = "upload_stalled"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"No data arrived for {seconds:g} seconds.")


class HeadTooLargeError(ServiceError):
    """Path, query and headers are larger than any of ours need to be."""

    status = 431
    code = "head_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"Path, query and headers are larger than {limit_bytes} bytes.", max_head_bytes=limit_bytes)


class BodyEncodingError(ServiceError):
    """JSON between systems is UTF-8 (RFC 8259, 8.1); Python's reader would take UTF-16 and UTF-32 as well."""

    status = 400
    code = "malformed_body"

    def __init__(self) -> None:
        super().__init__("The body is not JSON that can be read: it must be UTF-8.")


class BodyStalledError(ServiceError):
    """A JSON body took too long to arrive."""

    status = 408
    code = "body_stalled"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The body was not there after {seconds:g} seconds.")


class BodyTooLargeError(ServiceError):
    """A JSON body over the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The body is larger than {limit_bytes} bytes.", max_body_bytes=limit_bytes)


class UnauthorizedError(ServiceError):
    """No key, or one that is unknown, expired or revoked: which of these is nobody's business."""

    status = 401
    code = "unauthorized"

    def __init__(self) -> None:
        super().__init__("This needs Authorization: Bearer slim_... with a valid API key.")


class MetricsTokenError(ServiceError):
    """The service's numbers are the operator's."""

    status = 401
    code = "metrics_token_required"

    def __init__(self) -> None:
        super().__init__(
            "This needs the operator's token, SLIMTUNE_METRICS_TOKEN, as Authorization: Bearer ...; where neither it "
            "nor an API key is asked for, this machine may ask."
        )


class KeysRequiredError(ServiceError):
    """The API asks for no keys, and so serves nobody but this machine."""

    status = 403
    code = "keys_required"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"This service runs without API keys and answers to its own machine only; {reason}. To serve others, start "
            "it with SLIMTUNE_AUTHENTICATION=keys and make keys with `slimtune keys create`."
        )


class CrossSiteError(ServiceError):
    """A page of another site asks, through the browser of somebody on this machine."""

    status = 403
    code = "cross_site_refused"

    def __init__(self) -> None:
        super().__init__("A page of another site may not change anything here.")


class CsrfError(ServiceError):
    """A session's cookie came without what only the session's own pages have."""

    status = 403
    code = "csrf_token_missing"

    def __init__(self) -> None:
        super().__init__(
            "A session of the dashboard changes things from its own pages only. Reload the page; programs send an API "
            "key as `Authorization: Bearer`."
        )


class RateLimitedError(ServiceError):
    """More requests than are allowed in a minute."""

    status = 429
    code = "rate_limited"

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = seconds


def install(app: FastAPI) -> None:
    """Register the handlers. Exceptions without one are the middleware's (500)."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(MemoryCapInfeasibleError, _memory_cap_infeasible)
    app.add_exception_handler(RequestValidationError, _request_invalid)
    app.add_exception_handler(HTTPException, _http_exception)
    for kind in DATABASE_AWAY:
        app.add_exception_handler(kind, _database_unavailable)


def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101  # what this handler is registered for
    return service_problem(request.scope, error)


def service_problem(scope: Scope, error: ServiceError, *, log: bool = True) -> Response:
    """The answer to a request that failed with `error`; of a 5xx the log hears as well."""
    if log and error.status >= 500:
        logger.error("%s: %s", error.code, getattr(error, "detail", error.message))  # which names what clients need not
    param = getattr(error, "param", error.fields.get("field"))
    seconds = error.retry_after_seconds
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 6750
    if error.status == 408:
        headers["Connection"] = "close"  # what is still to come is not waited for (RFC 9110, 15.5.9)
    return problem_response(
        scope, error.status, error.code, error.message, fields=error.fields, param=param, headers=headers
    )


def _memory_cap_infeasible(request: Request, error: Exception) -> Response:
    assert isinstance(error, MemoryCapInfeasibleError)  # noqa: S101  # what this handler is registered for
    fields = {
        "memory_cap_bytes": error.memory_cap_bytes,
        "minimum_cap_bytes": error.minimum_cap_bytes,
        "max_sequence_length": error.max_sequence_length,
        "suggestions": list(error.suggestions),
    }
    return problem_response(request.scope, 422, "memory_cap_infeasible", str(error), fields=fields, param="memory_cap")


def _request_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  # what this handler is registered for
    errors = [(_field(item["loc"], item["type"]), _message(item)) for item in error.errors()]
    return problem_response(
        request.scope, 422, "invalid_request", _summary(errors), fields=field_errors(errors), param=errors[0][0] or None
    )


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # what this handler is registered for
    code, detail = {
        400: ("malformed_body", "The body is not JSON that can be read."),
        404: ("not_found", "There is nothing at this path."),
        405: ("method_not_allowed", "This path does not answer to this method."),
    }.get(error.status_code, ("http_error", "The request could not be handled."))
    fields: dict[str, object] = {}
    if error.status_code == 404 and request.url.path.startswith("/v1/"):
        fields["available"] = V1_RESOURCES
        detail += f" Of OpenAI's API there is what fine-tuning needs: {', '.join(V1_RESOURCES)}."
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
    return problem_response(request.scope, error.status_code, code, detail, fields=fields, headers=headers)


def _allowed(request: Request) -> list[str]:
    """The methods that this path answers to. Starlette names those of one route, and a path has a route for each."""
    routes = request.app.routes
    return [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


def _database_unavailable(request: Request, error: Exception) -> Response:
    return database_problem(request.scope, error)


def database_problem(scope: Scope, error: Exception) -> Response:
    """The answer where the database is away."""
    logger.error("database unavailable: %s", error)
    detail = "The database cannot be reached; try again."
    return problem_response(scope, 503, "database_unavailable", detail, headers={"Retry-After": "5"})


def _field(location: Sequence[int | str], kind: str) -> str:
    """`optimizer.learning_rate` of ("body", "optimizer", "learning_rate")."""
    if kind == "json_invalid":
        return ""
    parts = [str(part) for part in location[1:]]
    return ".".join(part for part in parts if not part.startswith(UNION_TAG))


def _message(item: dict[str, object]) -> str:
    if item["type"] == "json_invalid":
        location = item["loc"]
        position = location[-1] if isinstance(location, tuple) else 0
        return f"The body is not valid JSON at position {position}."
    if item["type"] == "extra_forbidden":
        return "there is no such field"
    return str(item["msg"]).removeprefix("Value error, ")


def _summary(errors: Sequence[tuple[str, str]]) -> str:
    listed = field_errors(errors[:1])["errors"][0]
    first = f"{listed['field']}: {listed['message']}" if listed["field"] else listed["message"]
    return first if len(errors) == 1 else f"{first} (and {len(errors) - 1} more)"
