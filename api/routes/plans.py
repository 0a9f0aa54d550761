"""Plans without jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body

from api import workload
from api.dependencies import ContextDep, SessionDep
from api.problems import STORAGE_ERRORS, documented
from api.responses import PlanAnswer
from api.schemas import PLAN_EXAMPLES, PlanRequest

router = APIRouter(prefix="/plans", tags=["plans"])


@router.post(
    "",
    summary="Plan a job without running it",
    responses=documented(
        400,
        "404 dataset_not_found",
        "404 model_not_found",
        "404 tokenizer_not_found",
        "409 dataset_not_tokenized",
        "409 tokenizer_not_ready",
        "409 model_not_ready",
        "422 invalid_request",
        "422 memory_cap_infeasible",
        "422 memory_cap_exceeds_device",
        "422 dataset_too_small",
        "422 dataset_unusable",
        "422 tokenizer_failed",
        *STORAGE_ERRORS,
    ),
)
def create(
    request: Annotated[PlanRequest, Body(openapi_examples=PLAN_EXAMPLES)], session: SessionDep, context: ContextDep
) -> PlanAnswer:
    """The plan that a job with this body would get, with its memory by cause and all the alternatives worth having.

    Stores nothing, though it may have a worker count a dataset's tokens (409 `dataset_not_tokenized`). If nothing fits,
    the problem `memory_cap_infeasible` says what would.
    """
    planned = workload.resolve(session, request, context.storage)
    return PlanAnswer.model_validate(
        {**planned.plan.to_json(), "memory_cap_bytes": request.memory_cap, "total_steps": planned.train.steps}
    )
