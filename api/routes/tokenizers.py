"""Tokenizers: upload or train, look, delete."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import fail_after
from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool

from api import middleware
from api.callers import Caller
from api.dependencies import CallerDep, Context, ContextDep, HasRoom, Limit, SessionDep
from api.errors import BodyStalledError, BodyTooLargeError
from api.problems import STORAGE_ERRORS, documented
from api.responses import Page, TokenizerResponse
from api.schemas import TrainTokenizerRequest
from api.uploads import form_body, receive_files
from service import database, datasets, tokenizers, uploads
from service.tokenizers import FILES, TokenizerUpload

router = APIRouter(prefix="/tokenizers", tags=["tokenizers"])

MAX_TRAIN_BYTES = 65_536


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without definitions of its own: FastAPI collects those of bodies that it reads itself."""
    definitions = schema.pop("$defs")
    schema["properties"]["train"] = definitions["TrainFields"]
    return schema


BODY = form_body(
    {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": "tokenizer.json, beside it tokenizer_config.json, chat_template.jinja.",
    },
    name={"type": "string", "maxLength": 200},
)
BODY["requestBody"]["content"]["application/json"] = {
    "schema": _inlined(TrainTokenizerRequest.model_json_schema()),
    "examples": {
        "bpe": {
            "summary": "Train a BPE of 8,192 tokens on a dataset",
            "value": {
                "train": {"dataset": "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617", "vocab_size": 8192},
                "name": "support tickets",
            },
        }
    },
}


@router.post(
    "",
    status_code=201,
    response_model=TokenizerResponse,
    summary="Upload or train a tokenizer",
    responses=documented(
        "404 dataset_not_found",
        "408 upload_stalled",
        "408 body_stalled",
        "413 upload_too_large",
        "413 storage_quota_exceeded",
        "413 body_too_large",
        "422 invalid_request",
        "422 tokenizer_invalid",
        507,
        *STORAGE_ERRORS,
    ),
    dependencies=[HasRoom],
    openapi_extra=BODY,
)
async def create(request: Request, response: Response, context: ContextDep, caller: CallerDep) -> TokenizerResponse:
    """Send `tokenizer.json` as the tokenizers library writes it (form field `file`), and beside it, if there are such,
    `tokenizer_config.json` and `chat_template.jinja`, each in a field `file` of its own. Or send JSON to have a BPE
    trained on a dataset. Either is `preparing` until a worker has looked at it.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        wanted = await _read(request)
        tokenizer = await run_in_threadpool(_train, context, caller, wanted)
    else:
        sink = await run_in_threadpool(TokenizerUpload, context.storage)

        def store(sink: TokenizerUpload, name: str | None) -> TokenizerResponse:
            row = sink.store(context.engine, name, tenant=caller.tenant, limits=caller.limits)
            return TokenizerResponse.of_row(row)

        tokenizer = await receive_files(request, sink, store, max_files=len(FILES), limiter=context.check_limiter)
    response.headers["Location"] = f"/tokenizers/{tokenizer.id}"
    return tokenizer


@router.get("", summary="List tokenizers", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^tok_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[TokenizerResponse]:
    """Newest first. Those of models come with the model."""
    rows, has_more = tokenizers.page(session, after, limit)
    return Page[TokenizerResponse](data=[TokenizerResponse.of_row(row) for row in rows], has_more=has_more)


@router.get("/{tokenizer_id}", summary="Get a tokenizer", responses=documented("404 tokenizer_not_found"))
def get(tokenizer_id: str, session: SessionDep) -> TokenizerResponse:
    return TokenizerResponse.of_row(tokenizers.get(session, tokenizer_id))


@router.delete(
    "/{tokenizer_id}",
    status_code=204,
    summary="Delete a tokenizer",
    responses=documented("404 tokenizer_not_found", "409 tokenizer_in_use", *STORAGE_ERRORS),
)
def delete(tokenizer_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """Refused while a job that is not finished, or a dataset that is being prepared, needs it."""
    folder = tokenizers.delete(session, tokenizer_id)
    uploads.leave(context.storage, folder)
    background.add_task(uploads.remove_left, context.storage, folder)


def _train(context: Context, caller: Caller, wanted: TrainTokenizerRequest) -> TokenizerResponse:
    with database.transaction(context.engine, caller.tenant, caller.limits) as session:
        dataset = datasets.get(session, wanted.train.dataset, keep=True)
        row = tokenizers.train(session, dataset, wanted.train.vocab_size, wanted.name)
        return TokenizerResponse.of_row(row)


async def _read(request: Request) -> TrainTokenizerRequest:
    """The JSON body, as FastAPI would have read it: the route also takes forms, of which it must not read any.

    Raises BodyTooLargeError, BodyStalledError, RequestValidationError.
    """
    body = bytearray()
    try:
        with fail_after(middleware.BODY_SECONDS):
            async for portion in request.stream():
                body += portion
                if len(body) > MAX_TRAIN_BYTES:
                    raise BodyTooLargeError(MAX_TRAIN_BYTES)
    except TimeoutError as error:
        raise BodyStalledError(middleware.BODY_SECONDS) from error
    try:
        value = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body", 0), "msg": str(error)}]) from error
    try:
        return TrainTokenizerRequest.model_validate(value)
    except ValidationError as error:
        located = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_url=False)]
        raise RequestValidationError(located) from error
