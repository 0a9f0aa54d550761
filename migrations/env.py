"""Runs the migrations. The database is the caller's `config.attributes["database_url"]`, else DATABASE_URL's."""

from __future__ import annotations

import sqlalchemy
from alembic import context

from service.models import Base
from service.settings import DatabaseSettings

MIGRATION_LOCK = 0x51137E57


def run() -> None:
    url = context.config.attributes.get("database_url") or DatabaseSettings().database_url
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
        with context.begin_transaction():
            # Two processes that start at once would both find an empty database.
            connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            context.run_migrations()


run()
