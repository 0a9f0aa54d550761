"""Models to start jobs from: built-in architectures and the outputs of finished jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query

from api.dependencies import ContextDep, Limit, SessionDep
from api.problems import documented
from api.responses import ModelResponse, Page
from service import base_models
from service.errors import BuiltinModelError
from slim_core.config import BUILTIN_MODELS

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List models", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^model_[0-9a-f]{32}$", description="The last output's id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[ModelResponse]:
    """The first page starts with the built-in models, beyond `limit`; then come outputs, newest first."""
    rows, has_more = base_models.page(session, after, limit)
    builtins = [ModelResponse.of_builtin(*item) for item in BUILTIN_MODELS.items()] if after is None else []
    return Page[ModelResponse](data=builtins + [ModelResponse.of_row(row) for row in rows], has_more=has_more)


@router.get("/{model_id}", summary="Get a model", responses=documented(404))
def get(model_id: str, session: SessionDep) -> ModelResponse:
    """By the name of a built-in model or the id of an output."""
    if (builtin := BUILTIN_MODELS.get(model_id)) is not None:
        return ModelResponse.of_builtin(model_id, builtin)
    return ModelResponse.of_row(base_models.get(session, model_id))


@router.delete("/{model_id}", status_code=204, summary="Delete an output", responses=documented(404, 409))
def delete(model_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """Deletes the checkpoint that the model is as well. Refused while a job that is not finished starts from it."""
    if model_id in BUILTIN_MODELS:
        raise BuiltinModelError(model_id)
    folder = base_models.delete(session, model_id)
    background.add_task(context.storage.remove, folder)
