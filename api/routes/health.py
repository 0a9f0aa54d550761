"""For whoever starts and watches the service."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from api.dependencies import ContextDep
from api.responses import HealthResponse, ReadinessResponse
from service import calibrations, database, queue

logger = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> HealthResponse:
    return HealthResponse(status="ok")


@router.get(
    "/readyz", summary="Can a job run?", responses={503: {"model": ReadinessResponse, "description": "Not yet."}}
)
def readyz(context: ContextDep, response: Response) -> ReadinessResponse:
    """Ready when the database and the broker answer and a worker has reported what its machine can do."""
    checks = {"database": True, "broker": queue.broker_answers(context.producer), "worker": False}
    try:
        with database.transaction(context.engine) as session:
            checks["worker"] = calibrations.current(session) is not None
    except SQLAlchemyError as error:  # out of reach, or not migrated yet
        logger.info("the database is not ready: %s", error)
        checks["database"] = False
    ready = all(checks.values())
    response.status_code = 200 if ready else 503
    return ReadinessResponse.model_validate({"status": "ok" if ready else "unavailable", "checks": checks})
