"""Samples from checkpoints."""

from __future__ import annotations

import functools
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body
from starlette.responses import Response

from api import sampler, sse
from api.dependencies import ContextDep, SessionDep
from api.errors import InvalidRequestError
from api.generation import GENERATE_EXAMPLES, GenerateRequest, GenerateResponse
from api.problems import STORAGE_ERRORS, documented
from api.samples import Sample
from service import checkpoints, jobs
from service.errors import CheckpointDamagedError, FilesDamagedError, GenerateUnavailableError, NotFoundError
from service.storage import Storage

router = APIRouter(prefix="/jobs/{job_id}/generate", tags=["checkpoints"])

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": sse.DOCUMENTED}}


@router.post(
    "",
    response_model=GenerateResponse,
    summary="Sample from a checkpoint",
    responses=documented(
        400,
        "404 job_not_found",
        "404 checkpoint_not_found",
        "409 no_checkpoint",
        "422 invalid_request",
        "422 generate_memory_exceeded",
        "422 prompt_too_long",
        "422 chat_template_refused",
        "429 generate_busy",
        "500 generate_failed",
        "500 checkpoint_damaged",
        501,
        "503 generate_timeout",
        "503 database_unavailable",
        *STORAGE_ERRORS,
    )
    | STREAM,
)
def generate(
    job_id: str,
    request: Annotated[GenerateRequest, Body(openapi_examples=GENERATE_EXAMPLES)],
    session: SessionDep,
    context: ContextDep,
) -> Response:
    """Continue a prompt, or answer a conversation, also while the job trains. Bounded in tokens, time and memory.

    With `stream` the answer is a stream of events: `token` (`text`), then `done` (all else of the answer without
    `stream`) or `error` (a problem).
    """
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError(("prompt", "give exactly one of prompt and messages"))
    if not sampler.is_available():
        raise GenerateUnavailableError
    checkpoint = checkpoints.to_read(session, jobs.get(session, job_id), str(request.checkpoint))
    fields = request.model_dump(exclude={"checkpoint", "seed", "stream"})
    return Sample(
        context.settings,
        context.sampler_slots,
        functools.partial(_hold, context.storage, checkpoint.path, checkpoint.step),
        {
            **fields,
            "stop": [request.stop] if isinstance(request.stop, str) else request.stop,
        },
        step=checkpoint.step,
        seed=secrets.randbits(31) if request.seed is None else request.seed,
        stream=request.stream,
    )


def _hold(files: Storage, folder: str, step: int, held: ExitStack) -> Path:
    """Raises NotFoundError, CheckpointDamagedError, StorageUnavailableError."""
    try:
        path = files.hold(folder, held)
        files.tidy()
    except FileNotFoundError as error:
        raise NotFoundError("checkpoint", str(step)) from error
    except FilesDamagedError as error:
        raise CheckpointDamagedError(str(error)) from error
    return path
