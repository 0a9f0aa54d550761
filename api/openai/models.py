"""Models: what GET /models lists, in OpenAI's shape."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query

from api.dependencies import ContextDep, SessionDep
from api.openai.responses import Deleted, ListOf, ModelObject, list_of
from api.problems import documented
from api.routes import models
from service import base_models
from slim_core.config import BUILTIN_MODELS

router = APIRouter(prefix="/models")

MAX_MODELS = 1_000


@router.get("", summary="List models", responses=documented(422))
def list_all(
    session: SessionDep,
    after: Annotated[
        str | None,
        Query(pattern="^model_[0-9a-f]{32}$", description="The last id of the page before, of those beyond built-ins."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_MODELS, description="The most beyond built-ins.")] = MAX_MODELS,
) -> ListOf[ModelObject]:
    """The built-in models, then uploads and outputs of jobs, newest first. OpenAI's client asks for no second page, so
    the first has up to 1,000."""
    rows, has_more = base_models.page(session, after, limit)
    builtins = [ModelObject.of_builtin(name) for name in BUILTIN_MODELS] if after is None else []
    return list_of(builtins + [ModelObject.of_row(row) for row in rows], has_more)


@router.get("/{model_id}", summary="Get a model", responses=documented("404 model_not_found"))
def get(model_id: str, session: SessionDep) -> ModelObject:
    """By the name of a built-in model or the id of another."""
    if model_id in BUILTIN_MODELS:
        return ModelObject.of_builtin(model_id)
    return ModelObject.of_row(base_models.get(session, model_id))


@router.delete(
    "/{model_id}",
    summary="Delete a model",
    responses=documented("404 model_not_found", "409 model_in_use", "409 model_built_in"),
)
def delete(model_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> Deleted:
    """Of an output, this deletes the checkpoint that it is. Refused while a job that is not finished starts from it."""
    models.delete(model_id, session, context, background)
    return Deleted(id=model_id, object="model")
