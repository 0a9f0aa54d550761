"""Runs the migrations. The database is the caller's `config.attributes["database_url"]`, else DATABASE_URL's."""

from __future__ import annotations

import time

import sqlalchemy
from alembic import context
from sqlalchemy import Connection

from service.models import Base
from service.settings import DatabaseSettings

MIGRATION_LOCK = 0x51137E57
LOCK_TIMEOUT_MILLISECONDS = 5_000
"""A statement that waits for a table makes all others wait behind it: rather the migration fails, and is run again."""
POLL_SECONDS = 0.2


def run() -> None:
    url = context.config.attributes.get("database_url") or DatabaseSettings().database_url
    engine = sqlalchemy.create_engine(
        url,
        poolclass=sqlalchemy.NullPool,
        connect_args={"options": f"-c lock_timeout={LOCK_TIMEOUT_MILLISECONDS}"},
    )
    with engine.connect() as connection:
        _wait_for_others(connection)
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            compare_server_default=True,
            transaction_per_migration=True,
        )
        with context.begin_transaction():
            context.run_migrations()


def _wait_for_others(connection: Connection) -> None:
    """Two processes that start at once would both find an empty database.

    The lock is the connection's, and goes with it. It is asked for again and again: one that waits for it in the
    database has a snapshot, and an index that is made concurrently waits until that is gone.
    """
    while True:
        taken = connection.scalar(sqlalchemy.select(sqlalchemy.func.pg_try_advisory_lock(MIGRATION_LOCK)))
        connection.commit()
        if taken:
            return
        time.sleep(POLL_SECONDS)


run()
