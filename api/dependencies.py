"""What routes ask for by type: settings, a session in a transaction, storage, the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from celery import Celery
from fastapi import Depends, Query, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from api.sampler import Slots
from service import database, tenancy
from service.limits import UNLIMITED, Limits
from service.settings import Settings
from service.storage import Storage


@dataclass(frozen=True, slots=True)
class Context:
    """What one application works with, made in its factory."""

    settings: Settings
    engine: Engine
    storage: Storage
    producer: Celery
    sampler_slots: Slots
    check_limiter: CapacityLimiter
    """Of the threads that check what was uploaded, each with a process that may take long and much memory."""


async def get_context(request: Request) -> Context:
    # Waits for nothing: `async`, so that FastAPI does not send each request through a thread for it.
    context: Context = request.app.state.context
    return context


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    tenant: str
    key_id: str | None = None
    """None where no key is needed."""
    limits: Limits = UNLIMITED


async def get_caller() -> Caller:
    """Whose request it is."""
    return Caller(tenancy.DEFAULT)


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
    await to_thread.run_sync(transaction.__exit__, None, None, None, limiter=CapacityLimiter(1))


async def get_request_id(request: Request) -> str:
    """The id that the answer's X-Request-ID has."""
    request_id: str = request.state.request_id
    return request_id


CallerDep = Annotated[Caller, Depends(get_caller)]
ContextDep = Annotated[Context, Depends(get_context)]
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
RequestId = Annotated[str, Depends(get_request_id)]
Limit = Annotated[int, Query(ge=1, le=100, description="The most entries to answer.")]
