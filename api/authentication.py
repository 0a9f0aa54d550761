"""Keys in requests: which are valid, how long that is remembered, and what wrong ones may cost.

256 random bits cannot be guessed, however often somebody tries. So wrong keys keep no valid one out, not even one of
the same address, which may be a proxy's: their limits are for the load that they are.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import Scope

from api import browsers
from api.callers import Caller
from api.errors import CsrfError, RateLimitedError, UnauthorizedError
from api.rates import Rates
from service import database, keys, web_sessions

REMEMBER_SECONDS = 3.0
"""How long a key stays valid for a process that has seen it, whatever becomes of it."""
REMEMBERED_KEYS = 10_000
FAILURES_PER_MINUTE = 60
"""Keys that one address may get wrong before it is told to wait."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    caller: Caller
    checked_at: float


class Authenticator:
    """For one process, on its event loop. Only valid keys are remembered: wrong ones fill nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: OrderedDict[str, _Known] = OrderedDict()
        """By the keys' hashes."""
        self._noted: dict[str, float] = {}
        """When the database heard last that a key is in use, by its id."""
        self._failures = Rates()
        self._running: dict[str, asyncio.Task[Caller | None]] = {}
        """One look in the database for each hash, however many requests wait for it."""
        self._threads = CapacityLimiter(4)
        """Of its own: routes that hold all others may be waiting for the connections that these give back."""
        self._first_time = CapacityLimiter(2)
        """For keys that are not known yet: a crowd of them holds nobody up whose key is."""
        self._after_failures = CapacityLimiter(1)
        """For those of addresses that got too many wrong: they hold no other address up."""

    async def caller(self, scope: Scope) -> Caller:
        """Who has the request's key, or the key of its session. Raises UnauthorizedError, CsrfError, RateLimitedError,
        SQLAlchemyError."""
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key:
            token = browsers.session_token(headers)
            if token is None:
                raise UnauthorizedError
            if not browsers.is_own(scope, headers, token):
                raise CsrfError
            return await self.owner(scope, token, of_session=True)
        if scheme.lower() != "bearer":
            raise self._failure(_peer(scope))
        return await self.owner(scope, key.strip(" "))

    async def owner(self, scope: Scope, secret: str, *, of_session: bool = False) -> Caller:
        """Who has this key, or the session with this token: one does not stand for the other, else a session could
        begin the next. Raises UnauthorizedError, RateLimitedError, SQLAlchemyError."""
        if secret.startswith(web_sessions.PREFIX) is not of_session:
            raise self._failure(_peer(scope))
        sha256 = keys.digest(secret)
        known = self._known.get(sha256)
        if known is not None:
            if monotonic() - known.checked_at > REMEMBER_SECONDS:
                await self._check_again(sha256, known)
            return known.caller
        peer = _peer(scope)
        if not (keys.is_key(secret) or web_sessions.is_token(secret)):
            raise self._failure(peer)
        suspect = not self._failures.has_turn(peer, FAILURES_PER_MINUTE)
        caller = await self._look_up_once(sha256, self._after_failures if suspect else self._first_time)
        if caller is None:
            raise self._failure(peer)
        self._known[sha256] = _Known(caller, monotonic())
        if len(self._known) > REMEMBERED_KEYS:
            self._known.popitem(last=False)
        return caller

    def _failure(self, peer: str) -> UnauthorizedError | RateLimitedError:
        turn = self._failures.take(peer, FAILURES_PER_MINUTE)
        if turn.allowed:
            return UnauthorizedError()
        return RateLimitedError("Too many wrong API keys came from this address.", turn.retry_seconds)

    def to_note(self, caller: Caller) -> str | None:
        """The key to `note`, if the database has not heard of its use for a minute."""
        now = monotonic()
        if caller.key_id is None or now - self._noted.get(caller.key_id, -math.inf) < keys.LAST_USED_SECONDS:
            return None
        self._noted[caller.key_id] = now
        return caller.key_id

    async def note(self, key_id: str) -> None:
        """For `last_used_at`, after the answer: it is not worth waiting for."""
        await to_thread.run_sync(self._note, key_id, limiter=self._threads)

    def forget(self, token: str) -> None:
        """At once, in this process: the session is over."""
        self._known.pop(keys.digest(token), None)

    async def _check_again(self, sha256: str, known: _Known) -> None:
        """Of requests that come meanwhile none waits: what was true a moment ago is for them."""
        before, known.checked_at = known.checked_at, monotonic()
        try:
            caller = await self._look_up(sha256, self._threads)
        except BaseException:
            known.checked_at = before
            raise
        if caller is None:
            self._known.pop(sha256, None)
            raise UnauthorizedError
        known.caller = caller

    async def _look_up_once(self, sha256: str, limiter: CapacityLimiter) -> Caller | None:
        """Goes on for the others if one of the requests that wait for it is given up."""
        task = self._running.get(sha256)
        if task is None:
            task = asyncio.create_task(self._look_up(sha256, limiter))
            self._running[sha256] = task
            task.add_done_callback(lambda done: self._ended(sha256, done))
        return await asyncio.shield(task)

    def _ended(self, sha256: str, task: asyncio.Task[Caller | None]) -> None:
        del self._running[sha256]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("a key was not looked up: %s", error)  # also to those that wait for it, if any still do

    async def _look_up(self, sha256: str, limiter: CapacityLimiter) -> Caller | None:
        return await to_thread.run_sync(self._find, sha256, limiter=limiter)

    def _find(self, sha256: str) -> Caller | None:
        with database.transaction(self._engine) as session:
            known = keys.find(session, sha256) or web_sessions.find(session, sha256)
        return None if known is None else Caller(known.tenant, known.key_id, known.limits)

    def _note(self, key_id: str) -> None:
        try:
            with database.transaction(self._engine) as session:
                keys.used(session, key_id)
        except SQLAlchemyError as error:
            logger.info("the use of %s is not noted: %s", key_id, error)


def _peer(scope: Scope) -> str:
    """Where a request comes from: an IPv4 address, the network of an IPv6 one, whose owner has all the others in it."""
    host = scope["client"][0] if scope.get("client") else "unix"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped  # how an IPv4 peer looks to a socket for both
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)) if mapped is None else mapped)
    return str(address)
