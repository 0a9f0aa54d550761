"""For whoever starts and watches the service."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request, Response

from api import local_only, prometheus
from api.dependencies import ContextDep
from api.errors import KeysRequiredError, MetricsTokenError
from api.problems import documented
from api.responses import HealthResponse, ReadinessResponse, SchemaResponse, VersionResponse
from service import database, telemetry
from service.settings import Settings
from service.version import API_VERSION, version

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> HealthResponse:
    return HealthResponse(status="ok")


@router.get(
    "/readyz", summary="Can a job run?", responses={503: {"model": ReadinessResponse, "description": "Not yet."}}
)
async def readyz(context: ContextDep, response: Response) -> ReadinessResponse:
    """Ready when the database and the broker answer and a worker has reported what its machine can do. What is said is
    up to a second old.
    """
    checks = await context.readiness.checks()
    ready = all(checks.values())
    response.status_code = 200 if ready else 503
    return ReadinessResponse.model_validate({"status": "ok" if ready else "unavailable", "checks": checks})


@router.get("/version", summary="Which version is this?")
async def show_version(context: ContextDep) -> VersionResponse:
    """Of the code, of this API, and of the database's schema, up to a second old."""
    schema = await context.readiness.schema()
    return VersionResponse(
        version=version(),
        revision=context.settings.revision,
        api=API_VERSION,
        schema=SchemaResponse(expected=schema.expected, found=schema.found),
    )


@router.get(
    "/metrics",
    summary="The service's numbers, for Prometheus",
    response_class=Response,
    responses=documented("401 metrics_token_required")
    | {200: {"content": {prometheus.CONTENT_TYPE: {"schema": {"type": "string"}, "example": prometheus.EXAMPLE}}}},
)
def numbers(context: ContextDep, request: Request) -> Response:
    """Jobs by state, the queue, attempts given back, devices, running jobs against their plans, and this process's
    requests. For the operator: it is asked with `SLIMTUNE_METRICS_TOKEN` as a bearer token. Without such a setting
    this machine alone may ask, and nobody where API keys are required: a proxy on this machine looks like it.
    """
    if not _may_see_numbers(request, context.settings):
        raise MetricsTokenError
    with database.reading(context.engine) as session:
        found = telemetry.snapshot(session)
    return Response(prometheus.exposition(found, context.numbers), media_type=prometheus.CONTENT_TYPE)


def _may_see_numbers(request: Request, settings: Settings) -> bool:
    if settings.metrics_token is not None:
        wanted = f"Bearer {settings.metrics_token.get_secret_value()}"
        return secrets.compare_digest(request.headers.get("authorization", "").encode(), wanted.encode())
    if settings.keys_required:
        return False
    try:
        local_only.check(request.scope)
    except KeysRequiredError:
        return False
    return True
