"""Training data: upload, look, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Body, Query, Request, Response

from api.dependencies import CallerDep, ContextDep, HasRoom, Limit, SessionDep
from api.problems import STORAGE_ERRORS, documented
from api.responses import DatasetResponse, Page, TokenizationResponse
from api.schemas import TOKENIZATION_EXAMPLES, TokenizationRequest
from api.uploads import form_body, receive_upload
from service import datasets, uploads
from service.datasets import DatasetUpload

UPLOAD_ERRORS = (
    "404 tokenizer_not_found",
    "404 model_not_found",
    "408 upload_stalled",
    "409 tokenizer_not_ready",
    "409 model_not_ready",
    "413 upload_too_large",
    "413 upload_expands_too_far",
    "413 upload_takes_too_long",
    "413 storage_quota_exceeded",
    "422 dataset_invalid",
    "422 dataset_format_unsupported",
    "422 invalid_request",
    "422 tokenizer_failed",
    "507 disk_full",
    *STORAGE_ERRORS,
)
"""What a route that takes datasets documents."""

router = APIRouter(prefix="/datasets", tags=["datasets"])

UPLOAD_BODY = form_body(
    {
        "type": "string",
        "format": "binary",
        "description": ".txt, .jsonl or .parquet, after which .gz or .zst may follow.",
    },
    name={"type": "string", "maxLength": 200, "description": "Default: the file's name."},
    tokenizer={
        "type": "string",
        "description": "Id of a tokenizer, or of a model for its own: have the tokens made by it.",
    },
)


@router.post(
    "",
    status_code=201,
    response_model=DatasetResponse,
    summary="Upload a dataset",
    responses=documented(*UPLOAD_ERRORS),
    dependencies=[HasRoom],
    openapi_extra=UPLOAD_BODY,
)
async def upload(request: Request, response: Response, context: ContextDep, caller: CallerDep) -> DatasetResponse:
    """Stream a file into the store. `.txt` is one document; each line of `.jsonl`, and each row of `.parquet`, is one:
    `{"text": "..."}`, `{"prompt": "...", "completion": "..."}` (the loss is the completion's) or `{"messages":
    [{"role": "...", "content": "..."}, ...]}` (the loss is the assistant's).

    Text and lines are checked while they arrive, compressed or not. If a line is broken, the answer lists the first 20
    with their numbers and nothing is stored. A worker then makes the tokens: see `tokenizations`.
    """

    def open_sink(filename: str) -> DatasetUpload:
        return DatasetUpload.within(context.settings, context.storage, filename)

    def store(sink: DatasetUpload, name: str | None, tokenizer: str | None) -> DatasetResponse:
        row = sink.store(context.engine, name, tokenizer, tenant=caller.tenant, limits=caller.limits)
        return DatasetResponse.of_row(row)

    dataset = await receive_upload(
        request, open_sink, store, ("name", "tokenizer"), limiter=context.readers.of(caller.tenant)
    )
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


@router.get("", summary="List datasets", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^ds_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page[DatasetResponse]:
    """Newest first."""
    rows, has_more = datasets.page(session, after, limit)
    return Page[DatasetResponse](data=[DatasetResponse.of_row(row) for row in rows], has_more=has_more)


@router.get("/{dataset_id}", summary="Get a dataset", responses=documented("404 dataset_not_found"))
def get(dataset_id: str, session: SessionDep) -> DatasetResponse:
    return DatasetResponse.of_row(datasets.get(session, dataset_id))


@router.post(
    "/{dataset_id}/tokenizations",
    status_code=202,
    summary="Have a dataset's tokens made",
    responses=documented(
        400,
        "404 dataset_not_found",
        "404 tokenizer_not_found",
        "404 model_not_found",
        "409 tokenizer_not_ready",
        "409 model_not_ready",
        422,
        "422 tokenizer_failed",
    ),
)
def tokenize(
    dataset_id: str,
    request: Annotated[TokenizationRequest, Body(openapi_examples=TOKENIZATION_EXAMPLES)],
    response: Response,
    session: SessionDep,
) -> TokenizationResponse:
    """By another tokenizer. A worker does it in the background; `GET /datasets/{id}` shows how far it is. Asking twice
    is fine, and asking for one that failed tries again."""
    tokenization = TokenizationResponse.of_row(datasets.tokenize(session, dataset_id, request.tokenizer))
    response.headers["Location"] = f"/datasets/{dataset_id}"
    return tokenization


@router.delete(
    "/{dataset_id}",
    status_code=204,
    summary="Delete a dataset",
    responses=documented("404 dataset_not_found", "409 dataset_in_use", *STORAGE_ERRORS),
)
def delete(dataset_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """With its tokens. Refused while a job that is not finished reads it, or a tokenizer is trained on it."""
    folder = datasets.delete(session, dataset_id)
    uploads.leave(context.storage, folder)
    background.add_task(uploads.remove_left, context.storage, folder)
