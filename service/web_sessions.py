"""Sessions of the dashboard: what a browser has in place of the API key that it logged in with.

A session's token is 256 random bits; the database has its SHA-256. It is worth what its key is worth, and ends with it.
Every function works in the caller's transaction, which belongs to no tenant.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from service import keys
from service.models import ApiKey, WebSession

PREFIX = "slims_"
HOURS = 12
"""After which somebody has to log in again."""
_TOKEN = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")


def begin(session: Session, key_id: str) -> str:
    """A new session's token. Sessions that are over go."""
    session.execute(delete(WebSession).where(WebSession.expires_at < func.now()))
    token = PREFIX + secrets.token_urlsafe(keys.KEY_BYTES)
    row = WebSession(sha256=keys.digest(token), key_id=key_id, expires_at=func.now() + timedelta(hours=HOURS))
    session.add(row)
    return token


def find(session: Session, sha256: str) -> keys.Known | None:
    """Whose session has a token with this hash. None if there is none, it is over, or its key is no longer valid."""
    mine = select(WebSession.key_id).where(WebSession.sha256 == sha256, WebSession.expires_at > func.now())
    row = keys.valid(session, ApiKey.id == mine.scalar_subquery())
    return None if row is None else keys.known(row)


def end(session: Session, token: str) -> None:
    session.execute(delete(WebSession).where(WebSession.sha256 == keys.digest(token)))


def is_token(text: str) -> bool:
    """Whether a text can be a session's token at all."""
    return _TOKEN.fullmatch(text) is not None


def csrf_token(token: str) -> str:
    """What the pages of a session send back, and no other site can know: nothing of the session can be had from it."""
    return hashlib.sha256(f"csrf {token}".encode()).hexdigest()
