"""What routes ask for by type: settings, a session in a transaction, storage, the queue."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from celery import Celery
from fastapi import Depends, Query, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.callers import Caller
from api.event_hub import EventHub
from api.looks import Looks
from api.places import Places
from api.prometheus import RequestNumbers
from api.readiness import Readiness
from api.sampler import Slots
from api.waker import Waker
from service import database, quotas, tracing
from service.settings import Settings
from service.storage import Storage

__all__ = ["Caller", "CallerDep", "Context", "ContextDep", "HasRoom", "Limit", "RequestId", "SessionDep"]

FORM_BYTES = 128 * 1024
"""What a form may have around its files, at most."""


@dataclass(frozen=True, slots=True)
class Context:
    """What one application works with, made in its factory."""

    settings: Settings
    engine: Engine
    storage: Storage
    producer: Celery
    waker: Waker
    sampler_slots: Slots
    event_hub: EventHub
    looks: Looks
    check_limiter: CapacityLimiter
    """Of the threads that check what was uploaded, each with a process that may take long and much memory."""
    readers: Places
    """Of the threads that read and check datasets as they come: a megabyte may take one of them minutes."""
    completions: Places
    """Of the threads that put uploads together, each of which may take half an hour."""
    stopping: threading.Event
    """Set when the process is told to end: what takes long gives up."""
    numbers: RequestNumbers
    readiness: Readiness


async def get_context(request: Request) -> Context:
    # Waits for nothing: `async`, so that FastAPI does not send each request through a thread for it.
    context: Context = request.app.state.context
    return context


async def get_caller(request: Request) -> Caller:
    """Whose request it is, as api.access found out."""
    caller: Caller = request.state.caller
    return caller


async def get_session(
    context: Annotated[Context, Depends(get_context)], caller: Annotated[Caller, Depends(get_caller)]
) -> AsyncIterator[Session]:
    """A session of the caller's tenant, whose transaction is committed before the answer goes out.

    Its beginning asks the database nothing and needs no thread. Its end does, and has one beyond the limit on threads:
    routes that hold all of these may be waiting for the connection that it gives back.
    """
    transaction = database.transaction(context.engine, caller.tenant, caller.limits)
    session = transaction.__enter__()
    try:
        yield session
    except BaseException as error:
        await to_thread.run_sync(
            transaction.__exit__, type(error), error, error.__traceback__, limiter=CapacityLimiter(1)
        )
        raise
    with tracing.span("commit"):
        await to_thread.run_sync(transaction.__exit__, None, None, None, limiter=CapacityLimiter(1))


def check_room(
    context: Annotated[Context, Depends(get_context)], caller: Annotated[Caller, Depends(get_caller)], request: Request
) -> None:
    """Before an upload is read: whether the tenant has room for it, as far as its headers say how much it is.

    Exact is the look in the transaction that makes the row. Raises StorageQuotaExceededError.
    """
    if caller.limits.max_bytes is None:
        return
    announced = request.headers.get("content-length", "")
    size = int(announced[:19]) - FORM_BYTES if announced.isascii() and announced.isdigit() else 0
    with database.transaction(context.engine, caller.tenant, caller.limits) as session:
        quotas.check_bytes(session, max(0, size))


async def get_request_id(request: Request) -> str:
    """The id that the answer's X-Request-ID has."""
    request_id: str = request.state.request_id
    return request_id


CallerDep = Annotated[Caller, Depends(get_caller)]
ContextDep = Annotated[Context, Depends(get_context)]
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
RequestId = Annotated[str, Depends(get_request_id)]
HasRoom = Depends(check_room)
Limit = Annotated[int, Query(ge=1, le=100, description="The most entries to answer.")]
