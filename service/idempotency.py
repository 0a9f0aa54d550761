"""Idempotency-Key: a request that is repeated with its key is done once (draft-ietf-httpapi-idempotency-key-header).

The key and what it stands for are written in one transaction, so both exist or none: a request that fails leaves its
key free. Every function works in the caller's transaction and commits nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import Table, bindparam, delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from service import database
from service.errors import IdempotencyKeyInFlightError, IdempotencyKeyReusedError
from service.models import IdempotencyKey

LIFETIME = timedelta(hours=24)
FORGET_AT_ONCE = 1_000
"""Keys, so that a sweep stays short."""


@dataclass(frozen=True, slots=True)
class Created:
    """A job, and what its creation was answered with."""

    job_id: str
    answer: str
    """The body, as it went out."""
    replayed: bool = False


def once(
    session: Session,
    key: str | None,
    request: dict[str, Any],
    create: Callable[[], Created],
    tenant: str | None = None,
) -> Created:
    """What `create` returns, or what it returned when this key came first. Without a key: `create` each time.

    A key is its tenant's (default: the session's), and is forgotten after `LIFETIME`. `request` is JSON, validated,
    without defaults. Raises IdempotencyKeyInFlightError while another transaction works under the key,
    IdempotencyKeyReusedError if the key came with another request, and what `create` raises.
    """
    if key is None:
        return create()
    tenant = tenant or database.tenant_of(session)
    if not database.try_lock(session, _lock_of(tenant, key)):
        raise IdempotencyKeyInFlightError
    request_sha256 = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    # Past the ORM, and so restricted to the tenant here.
    connection, mine = session.connection(), {"tenant": tenant, "key": key}
    known = connection.execute(_KNOWN, mine).one_or_none()
    if known is None:
        created = create()
        values = {"request_sha256": request_sha256, "job_id": created.job_id, "answer": created.answer}
        connection.execute(_STORE, {**mine, **values})
        return created
    if known.request_sha256 != request_sha256:
        raise IdempotencyKeyReusedError
    return Created(known.job_id, known.answer, replayed=True)


def forget_expired(session: Session) -> None:
    """Delete keys that have expired, the oldest first, up to `FORGET_AT_ONCE`. Those in use now are left for later."""
    columns = (IdempotencyKey.tenant, IdempotencyKey.key)
    oldest = select(*columns).where(_expired()).order_by(IdempotencyKey.created_at).limit(FORGET_AT_ONCE)
    session.execute(delete(IdempotencyKey).where(tuple_(*columns).in_(oldest.with_for_update(skip_locked=True))))


def _expired() -> Any:
    return IdempotencyKey.created_at <= func.now() - LIFETIME


def _lock_of(tenant: str, key: str) -> int:
    """A key of 64 bits for an advisory lock."""
    digest = hashlib.sha256(json.dumps([tenant, key]).encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


_KEYS = cast("Table", IdempotencyKey.__table__)
_KNOWN = select(_KEYS.c.request_sha256, _KEYS.c.job_id, _KEYS.c.answer).where(
    _KEYS.c.tenant == bindparam("tenant"), _KEYS.c.key == bindparam("key"), ~_expired()
)
_NEW = insert(_KEYS)
_STORE = _NEW.on_conflict_do_update(  # there may be one that has expired
    index_elements=[_KEYS.c.tenant, _KEYS.c.key],
    set_={name: _NEW.excluded[name] for name in ("request_sha256", "job_id", "answer", "created_at")},
)
