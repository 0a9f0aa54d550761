"""Files: datasets, which are what the purpose `fine-tune` is, and what jobs leave."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Query, Request
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.responses import Response

from api.dependencies import CallerDep, ContextDep, HasRoom, SessionDep
from api.downloads import Download
from api.errors import InvalidRequestError
from api.openai.paging import Limit, page_size
from api.openai.requests import MAX_EXPIRY_SECONDS, MIN_EXPIRY_SECONDS, ExpiresAfter
from api.openai.responses import Deleted, FileObject, ListOf, list_of
from api.problems import STORAGE_ERRORS, documented
from api.routes import datasets as dataset_routes
from api.routes.datasets import UPLOAD_ERRORS
from api.uploads import form_body, receive_upload
from service import database, datasets, result_files
from service.datasets import DatasetUpload
from service.errors import ResultFileError
from service.ids import is_id
from service.models import Dataset
from service.result_files import ResultFile
from service.storage import Storage, dataset_path

router = APIRouter(prefix="/files")

MISSING = ("404 file_not_found", "404 dataset_not_found", "507 disk_full", *STORAGE_ERRORS)
"""A file's, by what its id says that it is; the metrics of a job are written out when they are asked for first."""

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
EXPIRY: dict[str, Any] = {
    ANCHOR: {"type": "string", "enum": ["created_at"]},
    SECONDS: {"type": "integer", "minimum": MIN_EXPIRY_SECONDS, "maximum": MAX_EXPIRY_SECONDS},
}
UPLOAD_BODY = form_body(
    {
        "type": "string",
        "format": "binary",
        "description": ".jsonl, .txt or .parquet, after which .gz or .zst may follow.",
    },
    required=("purpose",),
    purpose={"type": "string", "enum": ["fine-tune"]},
    name={"type": "string", "maxLength": 200, "description": "Of the dataset. Default: the file's name."},
    tokenizer={"type": "string", "description": "Id of a tokenizer or model: have the tokens made by it."},
    **EXPIRY,
)
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The part that `Range` asked for."},
}


@router.post(
    "",
    response_model=FileObject,
    summary="Upload a file",
    responses=documented(*UPLOAD_ERRORS),
    openapi_extra=UPLOAD_BODY,
    dependencies=[HasRoom],
)
async def create(request: Request, context: ContextDep, caller: CallerDep) -> FileObject:
    """As POST /datasets: checked line by line while it arrives, and nothing of it is stored if a line is broken. The
    file's id is the dataset's."""

    def open_sink(filename: str) -> DatasetUpload:
        return DatasetUpload.within(context.settings, context.storage, filename)

    def store(sink: DatasetUpload, *texts: str | None) -> FileObject:
        purpose, anchor, seconds, name, tokenizer = texts
        if purpose != "fine-tune":
            raise InvalidRequestError(("purpose", "must be fine-tune"))
        row = sink.store(
            context.engine,
            name,
            tokenizer,
            tenant=caller.tenant,
            limits=caller.limits,
            expires_seconds=_expiry(anchor, seconds),
        )
        return FileObject.of_dataset(row)

    texts = ("purpose", ANCHOR, SECONDS, "name", "tokenizer")
    return await receive_upload(request, open_sink, store, texts, limiter=context.readers.of(caller.tenant))


def _expiry(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    try:
        return ExpiresAfter.model_validate_strings({"anchor": anchor, "seconds": seconds}).seconds
    except ValidationError as error:
        rule = f"must be created_at, with seconds from {MIN_EXPIRY_SECONDS} to {MAX_EXPIRY_SECONDS}"
        raise InvalidRequestError(("expires_after", rule)) from error


@router.get("", summary="List files", responses=documented(422))
def list_page(
    session: SessionDep,
    purpose: Annotated[
        str | None, Query(max_length=64, description="`fine-tune`; there are no files of another purpose in this list.")
    ] = None,
    after: Annotated[
        str | None, Query(pattern="^ds_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 100,
    order: Annotated[Literal["asc", "desc"], Query(description="By creation.")] = "desc",
) -> ListOf[FileObject]:
    """Uploaded files. What a job leaves is not among them but in its `result_files`."""
    if purpose not in (None, "fine-tune"):
        return list_of([], has_more=False)
    rows, has_more = datasets.page(session, after, page_size(limit), ascending=order == "asc")
    return list_of([FileObject.of_dataset(row) for row in rows], has_more)


def _get(session: Session, files: Storage, file_id: str) -> Dataset | ResultFile:
    """Raises NotFoundError."""
    return datasets.get(session, file_id) if is_id("ds", file_id) else result_files.get(session, files, file_id)


@router.get("/{file_id}", summary="Get a file", responses=documented(*MISSING))
def get(file_id: str, session: SessionDep, context: ContextDep) -> FileObject:
    found = _get(session, context.storage, file_id)
    return FileObject.of_dataset(found) if isinstance(found, Dataset) else FileObject.of_result(found)


@router.get(
    "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses=documented("400 range_malformed", *MISSING, 416, "500 checkpoint_damaged") | CONTENT,
)
def content(file_id: str, context: ContextDep, caller: CallerDep) -> Response:
    """The bytes, of an uploaded file as they came. `Range` and `If-Range` work; `ETag` is the SHA-256 in hex."""
    with database.transaction(context.engine, caller.tenant) as session:  # over before the file is asked for
        found = _get(session, context.storage, file_id)
    if isinstance(found, Dataset):
        stored = dataset_path(found.id, found.format, found.compression)
        # Named by us: what a client called it is for no header.
        name = f"{found.id}.{stored.rpartition('/')[2].partition('.')[2]}"
        return Download(context.storage, stored, name, found.bytes, found.sha256)
    return Download(context.storage, found.path, found.filename, found.bytes, found.sha256)


@router.delete(
    "/{file_id}",
    summary="Delete a file",
    responses=documented(*MISSING, "409 dataset_in_use", "409 file_is_a_result"),
)
def delete(file_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> Deleted:
    """With its tokens. Refused while a job that is not finished reads it, and for what a job has left."""
    if not is_id("ds", file_id):
        raise ResultFileError(_get(session, context.storage, file_id).id)
    dataset_routes.delete(file_id, session, context, background)
    return Deleted(id=file_id, object="file")
