"""The engine and the transaction. Nothing here retries: who may try again is for the caller to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy
from pydantic_core import from_json
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from service.limits import UNLIMITED, Limits
from service.settings import Settings
from service.tenancy import TenantSession, limits_of, tenant_of

__all__ = ["engine", "limits_of", "lock", "tenant_of", "transaction", "try_lock"]

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_MILLISECONDS = 30_000


def engine(settings: Settings) -> Engine:
    """A connection pool for one process. It connects on first use; dispose of it when the process ends."""
    return sqlalchemy.create_engine(
        settings.database_url,
        pool_size=20,  # opened as needed, and kept: a connection for one burst costs more than what it is for
        max_overflow=0,
        pool_timeout=5,
        pool_pre_ping=True,  # after a restart of the database the pool's old connections are dead
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


def try_lock(session: Session, key: int) -> bool:
    """Take the advisory lock `key` until the transaction ends; False if another session has it."""
    return bool(session.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_xact_lock(key))))
