"""The engine and the transaction. Nothing here retries: who may try again is for the caller to know."""

from __future__ import annotations

import functools
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from pydantic_core import from_json
from sqlalchemy import BigInteger, Engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session

from service.limits import UNLIMITED, Limits
from service.settings import Settings
from service.tenancy import TenantSession, limits_of, tenant_of

__all__ = ["engine", "limits_of", "lock", "tenant_of", "transaction", "try_lock"]

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_MILLISECONDS = 30_000
TRUSTED_SECONDS = 5.0
"""A connection that was in use so lately, and whose socket has nothing to say, is not asked whether it lives."""


def engine(settings: Settings) -> Engine:
    """A connection pool for one process. It connects on first use; dispose of it when the process ends."""
    made = sqlalchemy.create_engine(
        settings.database_url,
        pool_size=20,  # opened as needed, and kept: a connection for one burst costs more than what it is for
        max_overflow=0,
        pool_timeout=5,
        pool_recycle=1_800,
        hide_parameters=True,  # in exceptions, whose text goes into logs: they are what users sent
        json_deserializer=from_json,  # in half the time of `json`: plans are most of what a list of jobs reads
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": f"-c timezone=utc -c statement_timeout={STATEMENT_TIMEOUT_MILLISECONDS}"
            " -c idle_in_transaction_session_timeout=60000",
        },
    )
    _check_what_the_pool_hands_out(made)
    return made


def _check_what_the_pool_hands_out(made: Engine) -> None:
    """After a restart of the database the pool's old connections are dead, and all of them are replaced.

    As `pool_pre_ping` does, but without a round trip for each request: a connection that the server has closed can be
    read from, which asks only this machine's kernel. What a network has lost without a word shows in no such way, and
    is found out by a ping after some rest.
    """

    def note_use(_connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    def check(connection: Any, record: Any, _proxy: Any) -> None:
        used = record.info.get("used")
        if used is None:  # opened just now
            return
        if time.monotonic() - used < TRUSTED_SECONDS and not _readable(connection.fileno()):
            return
        try:
            made.dialect.do_ping(connection)
        except made.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error

    event.listen(made, "checkin", note_use)
    event.listen(made, "checkout", check)


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


@contextmanager
def transaction(bind: Engine, tenant: str | None = None, limits: Limits = UNLIMITED) -> Iterator[Session]:
    """A session in one transaction: committed at the end, rolled back on any exception. Rows stay readable after.

    With a tenant it sees and changes only that tenant's rows (tenancy.py), and keeps to `limits` in what it adds;
    without, as in workers and the sweeper, it sees all.
    """
    opened = (
        Session(bind, expire_on_commit=False)
        if tenant is None
        else TenantSession(bind, tenant, limits, expire_on_commit=False)
    )
    with opened as session, session.begin():
        yield session


def lock(session: Session, key: int) -> None:
    """Take the advisory lock `key` until the transaction ends, as soon as no other session has it."""
    session.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(key)))


@contextmanager
def reading(bind: Engine, tenant: str | None = None) -> Iterator[Session]:
    """A session for queries alone, each of which is a transaction of its own: what takes one or two needs no round
    trips for beginning and end. Sees what `transaction` would.
    """
    own = autocommitting(bind)
    with Session(own) if tenant is None else TenantSession(own, tenant, UNLIMITED) as session:
        yield session


@functools.lru_cache(maxsize=16)
def autocommitting(bind: Engine) -> Engine:
    """The same pool, for statements that are transactions of their own."""
    return bind.execution_options(isolation_level="AUTOCOMMIT")


def try_lock(session: Session, key: int) -> bool:
    """Take the advisory lock `key` until the transaction ends; False if another session has it."""
    return bool(session.connection().scalar(_TRY_LOCK, {"key": key}))


_KEY = sqlalchemy.bindparam("key", type_=BigInteger())
_TRY_LOCK = sqlalchemy.select(sqlalchemy.func.pg_try_advisory_xact_lock(_KEY))
