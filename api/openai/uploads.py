"""Uploads in parts, which become files."""

from __future__ import annotations

from typing import Annotated

from anyio import CapacityLimiter, fail_after, to_thread
from fastapi import APIRouter, BackgroundTasks, Body, Request
from starlette.concurrency import run_in_threadpool

from api.dependencies import CallerDep, ContextDep, SessionDep
from api.openai.requests import COMPLETE_EXAMPLES, UPLOAD_EXAMPLES, CompleteUploadRequest, CreateUploadRequest
from api.openai.responses import PartObject, UploadObject
from api.problems import STORAGE_ERRORS, documented
from api.uploads import form_body, receive_upload
from service import dataset_files, part_completions, part_uploads
from service.errors import CompletionsBusyError
from service.part_completions import Wanted
from service.part_uploads import MAX_PART_BYTES, PartSink
from service.upload_states import COMPLETED, PENDING

router = APIRouter(prefix="/uploads")

WAIT_SECONDS = 30.0
"""For the tenant's place where uploads are put together."""
PART_BODY = form_body(
    {"type": "string", "format": "binary", "description": f"At most {MAX_PART_BYTES} bytes."}, field="data"
)


@router.post(
    "",
    summary="Begin an upload in parts",
    responses=documented(
        400,
        "413 upload_too_large",
        "413 storage_quota_exceeded",
        422,
        "422 dataset_format_unsupported",
        "429 too_many_uploads",
    ),
)
def create(
    request: Annotated[CreateUploadRequest, Body(openapi_examples=UPLOAD_EXAMPLES)],
    session: SessionDep,
    context: ContextDep,
) -> UploadObject:
    """It is open for an hour. The name's ending says what the file is, as in POST /v1/files."""
    dataset_files.format_of(request.filename)
    seconds = None if request.expires_after is None else request.expires_after.seconds
    upload = part_uploads.create(session, request.filename, request.bytes, context.settings.max_upload_bytes, seconds)
    return UploadObject.of_row(upload, PENDING)


@router.post(
    "/{upload_id}/parts",
    summary="Add a part",
    responses=documented(
        "404 upload_not_found",
        "408 upload_stalled",
        "409 upload_state_conflict",
        "413 upload_too_large",
        "413 storage_quota_exceeded",
        422,
        "422 upload_mismatch",
        507,
        *STORAGE_ERRORS,
    ),
    openapi_extra=PART_BODY,
)
async def add_part(upload_id: str, request: Request, context: ContextDep, caller: CallerDep) -> PartObject:
    """In any order, several at once if you like: the order is said when the upload is completed. A part whose answer
    was lost is sent again."""
    sink = await run_in_threadpool(PartSink, context.engine, context.storage, upload_id, caller.tenant, caller.limits)
    part = await receive_upload(request, lambda _filename: sink, PartSink.store, texts=(), field="data")
    return PartObject.of_row(part)


@router.post(
    "/{upload_id}/complete",
    summary="Complete an upload",
    responses=documented(
        400,
        "404 upload_not_found",
        "404 part_not_found",
        "409 upload_state_conflict",
        "409 upload_being_completed",
        "409 upload_parts_gone",
        "413 upload_expands_too_far",
        "413 upload_takes_too_long",
        422,
        "422 upload_mismatch",
        "422 dataset_invalid",
        "429 too_many_completions",
        "503 upload_interrupted",
        507,
        *STORAGE_ERRORS,
    ),
)
async def complete(
    upload_id: str,
    request: Annotated[CompleteUploadRequest, Body(openapi_examples=COMPLETE_EXAMPLES)],
    context: ContextDep,
    caller: CallerDep,
) -> UploadObject:
    """Put the parts together in this order, and make a file of them. Asking twice is fine.

    If the parts are not the file that was announced, or a line of it is broken, no file is made and the upload stays
    open. The work goes on if the client leaves: who asks again gets what came of it. A tenant has one such request at
    work; others wait for some seconds.
    """

    def work() -> UploadObject:
        upload, dataset = part_completions.complete(
            context.engine,
            context.storage,
            context.settings,
            Wanted(upload_id, request.part_ids, request.md5),
            caller.tenant,
            caller.limits,
            context.stopping.is_set,
        )
        return UploadObject.of_row(upload, COMPLETED, dataset)

    place = context.completions.of(caller.tenant)
    try:
        with fail_after(WAIT_SECONDS):
            await place.acquire()
    except TimeoutError as error:
        raise CompletionsBusyError from error
    try:
        return await to_thread.run_sync(work, limiter=CapacityLimiter(1))  # a thread beside the common ones
    finally:
        place.release()


@router.post(
    "/{upload_id}/cancel",
    summary="Cancel an upload",
    responses=documented("404 upload_not_found", "409 upload_state_conflict", "409 upload_being_completed"),
)
def cancel(upload_id: str, session: SessionDep, context: ContextDep, background: BackgroundTasks) -> UploadObject:
    """With its parts. Asking twice is fine."""
    answer = UploadObject.of_row(*part_uploads.cancel(session, upload_id))
    background.add_task(part_uploads.remove_parts, context.storage, upload_id)
    return answer
