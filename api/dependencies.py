"""What routes ask for by type: settings, a session in a transaction, storage, the queue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from celery import Celery
from fastapi import Depends, Query, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service import database
from service.settings import Settings
from service.storage import Storage


@dataclass(frozen=True, slots=True)
class Context:
    """What one application works with, made in its factory."""

    settings: Settings
    engine: Engine
    storage: Storage
    producer: Celery


def get_context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


def get_session(context: Annotated[Context, Depends(get_context)]) -> Iterator[Session]:
    """A session whose transaction is committed before the answer goes out."""
    with database.transaction(context.engine) as session:
        yield session


def get_request_id(request: Request) -> str:
    """The id that the answer's X-Request-ID has."""
    request_id: str = request.state.request_id
    return request_id


ContextDep = Annotated[Context, Depends(get_context)]
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
RequestId = Annotated[str, Depends(get_request_id)]
Limit = Annotated[int, Query(ge=1, le=100, description="The most entries to answer.")]
