"""Requests of browsers that are logged in: the session's cookie, and what shows that a page of ours sent them.

The cookie is `SameSite=Strict`, so no other site's page can have it sent. What changes something needs more: a header
with a token that only pages of the session have (OWASP, Cross-Site Request Forgery Prevention).
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from service import web_sessions

COOKIE = "slimtune_session"
CSRF_HEADER = "X-CSRF-Token"
READING = frozenset({"GET", "HEAD"})


def session_token(headers: Headers) -> str | None:
    """The token in the request's cookie."""
    return cookie_parser(headers.get("cookie", "")).get(COOKIE) or None


def is_own(scope: Scope, headers: Headers, token: str) -> bool:
    """Whether a page of this session sent the request, or it changes nothing."""
    sent = headers.get(CSRF_HEADER, "")
    return scope["method"] in READING or hmac.compare_digest(sent.encode(), web_sessions.csrf_token(token).encode())
