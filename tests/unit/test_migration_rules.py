"""Migrations run while the service does (docs/operating.md): the SQL of each is read for what would stop it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

from migrations.online import create_index

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = list(ScriptDirectory.from_config(Config(ROOT / "alembic.ini")).walk_revisions())
LAST_BEFORE_THE_RULES = "0011"
"""Until there the service had to be stopped."""
EXCEPTION = "stops_the_service_because"
"""A migration that sets this says to people what they have to stop for it."""

REFUSED = {
    r"DROP (TABLE|COLUMN)|ALTER TABLE \w+ DROP (COLUMN )?\w": "takes away what the code of before still uses",
    r"RENAME ": "takes away the old name, which the code of before still uses",
    r"ALTER COLUMN \w+ TYPE": "writes the whole table anew, and keeps everybody out meanwhile",
    r"SET NOT NULL": "reads the whole table, and keeps everybody out meanwhile",
    r"ADD COLUMN (?=.*NOT NULL)(?!.*DEFAULT)": "fails where there are rows; inserts of the code of before fail",
    r"ADD COLUMN .*DEFAULT (clock_timestamp|gen_random)": "writes the whole table anew",
    r"ADD (CONSTRAINT|CHECK|FOREIGN|PRIMARY|UNIQUE)(?!.*NOT VALID)": "reads the whole table: NOT VALID, then VALIDATE",
    r"CREATE (UNIQUE )?INDEX (?!CONCURRENTLY)": "keeps writers out as long as it takes: migrations.online.create_index",
    r"^(UPDATE|DELETE) ": "changes any number of rows in one transaction: let the sweeper do it in batches",
    r"LOCK TABLE|CLUSTER|VACUUM FULL|TRUNCATE": "keeps everybody out",
}


def sql_of(upgrade: Callable[[], object]) -> list[str]:
    """The statements of a migration, each on one line."""
    out = io.StringIO()
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True, "output_buffer": out})
    with Operations.context(context):
        upgrade()
    text = re.sub(r"\$\$.*?\$\$", "$$...$$", out.getvalue(), flags=re.DOTALL)  # functions run later
    text = text.replace('"', "")
    return [" ".join(statement.split()) for statement in text.split(";") if statement.strip()]


def faults(statements: list[str]) -> Iterator[str]:
    """What is wrong with them. To a table that the migration itself makes it may do anything."""
    made = set(re.findall(r"CREATE TABLE (?:IF NOT EXISTS )?(\w+)", "\n".join(statements)))
    for statement in statements:
        table = re.search(r"(?:ALTER TABLE|\bON|UPDATE|DELETE FROM|INTO) (?:ONLY )?(\w+)", statement)
        if statement.startswith("CREATE TABLE") or (table is not None and table[1] in made):
            continue
        yield from (f"{statement}: {why}" for pattern, why in REFUSED.items() if re.search(pattern, statement))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.revision)
def test_a_migration_stops_nobody(script: Script) -> None:
    if script.revision <= LAST_BEFORE_THE_RULES or getattr(script.module, EXCEPTION, None):
        return
    assert list(faults(sql_of(script.module.upgrade))) == []


@pytest.mark.parametrize(
    "upgrade",
    [
        lambda: op.drop_column("jobs", "loss"),
        lambda: op.drop_table("jobs"),
        lambda: op.rename_table("jobs", "runs"),
        lambda: op.alter_column("jobs", "loss", new_column_name="cost"),
        lambda: op.alter_column("jobs", "step", type_=sa.Integer()),
        lambda: op.alter_column("jobs", "name", nullable=False),
        lambda: op.add_column("jobs", sa.Column("added", sa.Text(), nullable=False)),
        lambda: op.add_column("jobs", sa.Column("added", sa.DateTime(), server_default=sa.text("clock_timestamp()"))),
        lambda: op.create_index("jobs_name", "jobs", ["name"]),
        lambda: op.create_check_constraint("jobs_small", "jobs", "step < 7"),
        lambda: op.create_foreign_key("jobs_dataset", "jobs", "datasets", ["dataset_id"], ["id"]),
        lambda: op.create_unique_constraint("jobs_once", "jobs", ["name"]),
        lambda: op.execute("UPDATE jobs SET name = 'x'"),
        lambda: op.execute("LOCK TABLE jobs"),
    ],
)
def test_what_would_stop_it_is_found(upgrade: Callable[[], object]) -> None:
    assert list(faults(sql_of(upgrade)))


@pytest.mark.parametrize(
    "upgrade",
    [
        lambda: op.add_column("jobs", sa.Column("added", sa.Text(), nullable=True)),
        lambda: op.add_column("jobs", sa.Column("added", sa.Text(), nullable=False, server_default="x")),
        lambda: create_index("jobs_name", "jobs", ["name"], where="name IS NOT NULL"),
        lambda: op.execute("ALTER TABLE jobs ADD CONSTRAINT jobs_small CHECK (step < 7) NOT VALID"),
        lambda: op.create_table("new", sa.Column("id", sa.Text(), index=True)),
    ],
)
def test_what_is_meant_to_be_done_is_not(upgrade: Callable[[], object]) -> None:
    assert list(faults(sql_of(upgrade))) == []
