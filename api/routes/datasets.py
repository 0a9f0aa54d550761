"""Training data: upload, look, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response

from api.dependencies import ContextDep, Limit, SessionDep
from api.problems import documented
from api.responses import DatasetResponse, Page
from api.uploads import receive_upload
from service import datasets
from service.datasets import DatasetUpload
from service.models import Dataset

router = APIRouter(prefix="/datasets", tags=["datasets"])

UPLOAD_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "UTF-8, .txt or .jsonl."},
                        "name": {"type": "string", "maxLength": 200, "description": "Default: the file's name."},
                    },
                }
            }
        },
    }
}


@router.post(
    "",
    status_code=201,
    response_model=DatasetResponse,
    summary="Upload a dataset",
    responses=documented(408, 413, 422, 507),
    openapi_extra=UPLOAD_BODY,
)
async def upload(request: Request, response: Response, context: ContextDep) -> Dataset:
    """Stream a file into the store: `.txt` is one document, `.jsonl` has `{"text": "..."}` on each line.

    The whole file is checked while it arrives. If a line is broken, the answer lists the first 20 with their numbers
    and nothing is stored.
    """

    def open_sink(filename: str) -> DatasetUpload:
        return DatasetUpload(context.storage, filename, context.settings.max_upload_bytes)

    def store(sink: DatasetUpload, name: str | None) -> Dataset:
        return sink.store(context.engine, name)

    dataset = await receive_upload(request, open_sink, store)
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return dataset


@router.get("", response_model=Page[DatasetResponse], summary="List datasets", responses=documented(422))
def list_page(
    session: SessionDep,
    after: Annotated[
        str | None, Query(pattern="^ds_[0-9a-f]{32}$", description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> dict[str, Any]:
    """Newest first."""
    rows, has_more = datasets.page(session, after, limit)
    return {"data": rows, "has_more": has_more}


@router.get("/{dataset_id}", response_model=DatasetResponse, summary="Get a dataset", responses=documented(404))
def get(dataset_id: str, session: SessionDep) -> Dataset:
    return datasets.get(session, dataset_id)


@router.delete("/{dataset_id}", status_code=204, summary="Delete a dataset", responses=documented(404, 409))
def delete(dataset_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> None:
    """Refused while a job that is not finished reads it."""
    folder = datasets.delete(session, dataset_id)
    background.add_task(context.storage.remove, folder)
