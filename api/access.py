"""Who may ask, before anything of a request is read: keys, their rate, or this machine alone. Plain ASGI.

A middleware, not a dependency of routes: what has no route yet is closed too.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import local_only, web
from api.authentication import Authenticator
from api.callers import Caller
from api.errors import DATABASE_AWAY, RateLimitedError, database_problem, service_problem
from api.rates import Rates, Turn
from service.errors import ServiceError
from service.tenancy import DEFAULT

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""Without a key, from everywhere: whether the service is well, and the description that is the same for everybody. For
its numbers there is a token of their own."""
ANYBODY = Caller(DEFAULT)
"""Who asks where no key is needed."""


class Access:
    """Puts the caller into the request's state, or answers 401, 403 or 429. `OPEN_PATHS` are for everybody."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator | None) -> None:
        """Without an authenticator the API serves its own machine (local_only.py)."""
        self._app = app
        self._authenticator = authenticator
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["path"].startswith(web.OPEN):
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
        except ServiceError as error:
            await service_problem(scope, error)(scope, receive, send)
            return
        except DATABASE_AWAY as error:
            await database_problem(scope, error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        turn = self._turn(caller)
        if turn is not None:
            send = _with_headers(send, turn)
            if not turn.allowed:
                message = f"This API key allows {turn.limit} requests a minute."
                await service_problem(scope, RateLimitedError(message, turn.retry_seconds))(scope, receive, send)
                return
        await self._app(scope, receive, send)
        if self._authenticator is not None and (key_id := self._authenticator.to_note(caller)) is not None:
            await self._authenticator.note(key_id)

    async def _caller(self, scope: Scope) -> Caller:
        if self._authenticator is None:
            local_only.check(scope)
            return ANYBODY
        return await self._authenticator.caller(scope)

    def _turn(self, caller: Caller) -> Turn | None:
        limit = caller.limits.requests_per_minute
        return None if limit is None or caller.key_id is None else self._rates.take(caller.key_id, limit)


def _with_headers(send: Send, turn: Turn) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(turn.headers())
        await send(message)

    return send_with_headers
