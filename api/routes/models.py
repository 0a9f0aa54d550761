"""Models to start jobs from: built-in architectures, uploaded models and the outputs of finished jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from api.dependencies import CallerDep, ContextDep, HasRoom, Limit, SessionDep
from api.model_check import check_model
from api.problems import STORAGE_ERRORS, documented
from api.responses import ModelResponse, Page
from api.uploads import form_body, receive_files
from service import base_models, deletions, uploads
from service.errors import BuiltinModelError
from service.model_uploads import ACCEPTED, MAX_FILES, ModelUpload
from slim_core.config import BUILTIN_MODELS

router = APIRouter(prefix="/models", tags=["models"])

UPLOAD_BODY = form_body(
    {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": f"Repeated, once for each file: {', '.join(ACCEPTED)}.",
    },
    name={"type": "string", "maxLength": 200},
)


@router.post(
    "",
    status_code=201,
    response_model=ModelResponse,
    summary="Upload a base model",
    responses=documented(
        "408 upload_stalled",
        "413 upload_too_large",
        "413 storage_quota_exceeded",
        "422 model_invalid",
        "422 invalid_request",
        507,
        *STORAGE_ERRORS,
    ),
    dependencies=[HasRoom],
    openapi_extra=UPLOAD_BODY,
)
async def upload(request: Request, response: Response, context: ContextDep, caller: CallerDep) -> ModelResponse:
    """Stream the files of a model into the store: `config.json` and `model.safetensors` (or shards with their index),
    and its tokenizer; or one `.gguf`, which a worker converts in the background (`status` says when it is ready).

    Everything is checked before anything is kept: the answer lists the first 20 problems, by file and tensor.
    """
    settings = context.settings

    def check(folder: Path) -> base_models.CheckedModel:
        return check_model(folder, settings.preparer_memory_bytes)

    def store(sink: ModelUpload, name: str | None) -> ModelResponse:
        row = sink.store(context.engine, name, check, tenant=caller.tenant, limits=caller.limits)
        return ModelResponse.of_row(row)

    sink = await run_in_threadpool(ModelUpload, context.storage, settings.max_model_bytes)
    model = await receive_files(request, sink, store, MAX_FILES, limiter=context.check_limiter)
    response.headers["Location"] = f"/models/{model.id}"
    return model


@router.get("", summary="List models", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None,
        Query(pattern="^model_[0-9a-f]{32}$", description="The last id of the page before, of those beyond built-ins."),
    ] = None,
    limit: Limit = 20,
) -> Page[ModelResponse]:
    """The first page starts with the built-in models, beyond `limit`; then come uploads and outputs, newest first."""
    rows, has_more = base_models.page(session, after, limit)
    builtins = [ModelResponse.of_builtin(*item) for item in BUILTIN_MODELS.items()] if after is None else []
    return Page[ModelResponse](data=builtins + [ModelResponse.of_row(row) for row in rows], has_more=has_more)


@router.get("/{model_id}", summary="Get a model", responses=documented("404 model_not_found"))
def get(model_id: str, session: SessionDep) -> ModelResponse:
    """By the name of a built-in model or the id of another."""
    if (builtin := BUILTIN_MODELS.get(model_id)) is not None:
        return ModelResponse.of_builtin(model_id, builtin)
    return ModelResponse.of_row(base_models.get(session, model_id))


@router.delete(
    "/{model_id}",
    status_code=204,
    summary="Delete a model",
    responses=documented("404 model_not_found", "409 model_in_use", "409 model_built_in", *STORAGE_ERRORS),
)
def delete(model_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """Of an output, this deletes the checkpoint that it is. Refused while a job that is not finished starts from it."""
    if model_id in BUILTIN_MODELS:
        raise BuiltinModelError(model_id)
    folder = deletions.delete_model(session, model_id)
    uploads.leave(context.storage, folder)
    background.add_task(uploads.remove_left, context.storage, folder)
