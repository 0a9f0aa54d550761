"""The migrations themselves: up, down, up, and the same schema as the ORM's."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import alembic.command
import pytest
import sqlalchemy
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect

from service import schema
from service.models import Base

ROOT = Path(__file__).resolve().parents[2]


def config(url: str) -> Config:
    result = Config(ROOT / "alembic.ini")
    result.attributes["database_url"] = url
    return result


@pytest.fixture
def empty(empty_database_url: str) -> Engine:
    return sqlalchemy.create_engine(empty_database_url, poolclass=sqlalchemy.NullPool)


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def functions(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        query = "SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
        return list(connection.scalars(sqlalchemy.text(query)))


def test_up_down_up(empty: Engine, empty_database_url: str) -> None:
    alembic.command.upgrade(config(empty_database_url), "head")
    assert tables(empty) == set(Base.metadata.tables)
    assert sorted(functions(empty)) == ["job_events_count_deleted", "jobs_refuse_leaving_terminal"]
    alembic.command.downgrade(config(empty_database_url), "base")
    assert tables(empty) == set()
    assert functions(empty) == []
    alembic.command.upgrade(config(empty_database_url), "head")
    assert tables(empty) == set(Base.metadata.tables)


def test_plans_of_the_first_schema_get_what_the_second_one_needs(empty: Engine, empty_database_url: str) -> None:
    """A job that waits while the service is upgraded must still be readable, and run."""
    alembic.command.upgrade(config(empty_database_url), "0001")
    columns = {"id": "job_1", "status": "paused", "desired": "pause", "dataset_id": "ds_1", "model": "performer-tiny"}
    numbers = {"memory_cap_bytes": 1, "total_steps": 1, "predicted_peak_bytes": 1}
    documents = {"spec": "{}", "train": "{}", "model_config": "{}", "plan": '{"chunk_length": 64}'}
    values = {**columns, **numbers, **documents}
    placeholders = ", ".join(f"CAST(:{name} AS jsonb)" if name in documents else f":{name}" for name in values)
    with empty.begin() as connection:
        statement = f"INSERT INTO jobs ({', '.join(values)}) VALUES ({placeholders})"  # no input
        connection.execute(sqlalchemy.text(statement), values)
    alembic.command.upgrade(config(empty_database_url), "head")
    with empty.connect() as connection:
        plan = connection.scalar(sqlalchemy.text("SELECT plan FROM jobs"))
    assert plan == {"chunk_length": 64, "max_sequence_length": 0, "check_chunk_length": None, "time_factor": 1.0}


def test_the_history_of_calibrations_comes_and_goes(empty: Engine, empty_database_url: str) -> None:
    insert = "INSERT INTO calibrations (device, version, data, worker) VALUES ('cpu', :version, '{}', 'w')"
    alembic.command.upgrade(config(empty_database_url), "0003")
    with empty.begin() as connection:
        connection.execute(sqlalchemy.text(insert), {"version": 7})
    alembic.command.upgrade(config(empty_database_url), "head")
    with empty.begin() as connection:
        connection.execute(sqlalchemy.text(insert), {"version": 8})
        assert list(connection.scalars(sqlalchemy.text("SELECT version FROM calibrations ORDER BY 1"))) == [7, 8]
    alembic.command.downgrade(config(empty_database_url), "0003")
    with empty.begin() as connection:
        assert list(connection.scalars(sqlalchemy.text("SELECT version FROM calibrations"))) == [8]


def test_the_migrated_schema_is_the_orms(database_url: str) -> None:
    alembic.command.check(config(database_url))


def test_the_code_knows_the_newest_migration(database_url: str) -> None:
    """`service.schema.REVISION` goes up with each: /readyz compares it with what is in the database."""
    script = ScriptDirectory.from_config(config(database_url))
    assert script.get_heads() == [schema.REVISION]
    assert all(re.fullmatch(r"\d{4}", revision.revision) for revision in script.walk_revisions())


def test_the_check_constraints_are_the_orms(database_url: str, empty: Engine) -> None:
    Base.metadata.create_all(empty)
    migrated = sqlalchemy.create_engine(database_url, poolclass=sqlalchemy.NullPool)
    for name in Base.metadata.tables:
        expected = {check["name"]: check["sqltext"] for check in inspect(empty).get_check_constraints(name)}
        assert {check["name"]: check["sqltext"] for check in inspect(migrated).get_check_constraints(name)} == expected
    assert expected is not None


def test_two_processes_may_migrate_at_once(empty: Engine, empty_database_url: str) -> None:
    command = "import alembic.command, sys; from alembic.config import Config; c = Config(sys.argv[1]);"
    command += "c.attributes['database_url'] = sys.argv[2]; alembic.command.upgrade(c, 'head')"
    run = [command, str(ROOT / "alembic.ini"), empty_database_url]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: _python(run), range(2)))
    assert results == ["", ""]
    assert tables(empty) == set(Base.metadata.tables)


def _python(arguments: list[str]) -> str:
    """The last line of stderr if it failed."""
    done = subprocess.run([sys.executable, "-c", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[-1] if done.returncode else ""
