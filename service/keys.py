"""API keys: made, listed and revoked by the operator; looked up by the API.

A key is 256 random bits behind `slim_`. Only its SHA-256 is stored, which is enough for what has that many bits: there
is nothing to guess that a slow hash would have to protect. Every function works in the caller's transaction, which
belongs to no tenant, and commits nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from service.errors import NotFoundError
from service.ids import is_id, new_id
from service.limits import UNLIMITED, Limits
from service.models import ApiKey

PREFIX = "slim_"
KEY_BYTES = 32
SHOWN_CHARACTERS = len(PREFIX) + 6
"""Of a key in lists: 36 of its 256 bits."""
LAST_USED_SECONDS = 60
"""How exact `last_used_at` is."""
_TENANT = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class Known:
    """Who a valid key says is asking."""

    key_id: str
    tenant: str
    limits: Limits


def create(
    session: Session, tenant: str, name: str, limits: Limits = UNLIMITED, expires_days: float | None = None
) -> tuple[ApiKey, str]:
    """A new key: its row, and the key itself, which nobody can read again. Raises ValueError for a tenant whose name is
    not up to 63 small letters, digits, and `_`, `.` or `-` after the first."""
    if _TENANT.fullmatch(tenant) is None:
        raise ValueError(
            f"tenant: {tenant[:80]!r} is not up to 63 of a-z, 0-9, '_', '.' and '-', the first a letter or digit"
        )
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    row = ApiKey(
        id=new_id("key"),
        tenant=tenant,
        name=name,
        sha256=digest(key),
        prefix=key[:SHOWN_CHARACTERS],
        expires_at=None if expires_days is None else func.now() + timedelta(days=expires_days),
        requests_per_minute=limits.requests_per_minute,
        max_jobs=limits.max_jobs,
        max_bytes=limits.max_bytes,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, key


def listed(session: Session, tenant: str | None = None) -> list[ApiKey]:
    """All keys, oldest first, those that are no longer valid too; with `tenant` that tenant's."""
    query = select(ApiKey).order_by(ApiKey.id)
    return list(session.scalars(query if tenant is None else query.where(ApiKey.tenant == tenant)))


def revoke(session: Session, key_id: str) -> ApiKey:
    """From now on the key is unknown; revoking it twice is fine. Raises NotFoundError."""
    values = {"revoked_at": func.coalesce(ApiKey.revoked_at, func.now())}
    statement = update(ApiKey).where(ApiKey.id == key_id).values(values).returning(ApiKey)
    row = session.scalars(statement).one_or_none() if is_id("key", key_id) else None
    if row is None:
        raise NotFoundError("key", key_id)
    return row


def find(session: Session, sha256: str) -> Known | None:
    """Who has the key with this hash (`digest`). None for one that never was, has expired or is revoked alike."""
    row = valid(session, ApiKey.sha256 == sha256)
    return known(row) if row is not None and hmac.compare_digest(row.sha256, sha256) else None


def valid(session: Session, which: ColumnElement[bool]) -> ApiKey | None:
    """The one key for which this holds, unless it has expired or is revoked."""
    unexpired = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now())
    return session.scalars(select(ApiKey).where(which, ApiKey.revoked_at.is_(None), unexpired)).one_or_none()


def known(row: ApiKey) -> Known:
    return Known(row.id, row.tenant, Limits(row.requests_per_minute, row.max_jobs, row.max_bytes))


def used(session: Session, key_id: str) -> None:
    """Note that the key is in use, at most once in `LAST_USED_SECONDS`."""
    before = func.now() - timedelta(seconds=LAST_USED_SECONDS)
    stale = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < before)
    session.execute(
        update(ApiKey).where(ApiKey.id == key_id, stale).values(last_used_at=func.now()),
        execution_options={"synchronize_session": False},
    )


def is_key(text: str) -> bool:
    """Whether a text can be a key at all."""
    return re.fullmatch(rf"{PREFIX}[A-Za-z0-9_-]{{43}}", text) is not None


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
