"""A tenant's session sees, changes and deletes only what is the tenant's, however it is asked.

With the listener of service/tenancy.py removed, every test here but those about new rows is red.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Engine, bindparam, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from service import events, jobs, tenancy
from service.database import tenant_of, transaction
from service.models import Base, Checkpoint, Dataset, Job, JobEvent, Metric, Model, Tokenization, Tokenizer
from service.storage import Storage
from tests.integration.seed import add_dataset, add_job, planned

MINE, THEIRS = "acme", "other"
ANYTHING = "anything"
EVERYTHING = (Dataset, Tokenizer, Model, Job, JobEvent, Metric, Checkpoint, Tokenization)


@pytest.fixture
def mine(bind: Engine) -> Iterator[Session]:
    with transaction(bind, MINE) as session:
        yield session


@pytest.fixture
def theirs(bind: Engine, storage: Storage) -> dict[str, str]:
    """Ids of one row of each table that has an owner."""
    dataset, job = add_dataset(bind, storage, tenant=THEIRS).id, ""
    job = add_job(bind, dataset, tenant=THEIRS).id
    with transaction(bind) as session:
        step: dict[str, Any] = {"job_id": job, "step": 1, "attempt": 1}
        output = {"kind": "output", "status": "ready", "layout": "slimtune", "config": {}, "step": 1, "path": "p"}
        session.add_all(
            [
                Model(id="model_1", tenant=THEIRS, name="m", job_id=job, **output),
                Tokenizer(id="tok_1", tenant=THEIRS, name="t", source="upload", status="ready", path="t"),
                Metric(**step),
                Checkpoint(**step, files=[], path="p"),
            ]
        )
    return {"dataset": dataset, "job": job, "model": "model_1", "tokenizer": "tok_1"}


JOB: Any = bindparam("job")
QUERIES: dict[str, Any] = {
    "rows": select(Job).where(Job.id == JOB),
    "a column": select(Job.id).where(Job.id == JOB),
    "an aggregate": select(func.max(Job.id)),
    "locked": select(Job).where(Job.id == JOB).with_for_update(),
    "an alias": select(aliased(Job).id),
    "a subquery": select(select(Job.id).subquery().c.id),
    "a CTE": select(select(Job.id).cte().c.id),
    "a scalar subquery": select(select(func.max(Job.id)).scalar_subquery()),
    "IN": select(Dataset.id).where(Dataset.id.in_(select(Job.dataset_id))),
    "a union": select(Job.id).union_all(select(Job.id)),
    "a join": select(JobEvent.id).join(Job, Job.id == JobEvent.job_id),
    "an outer join": select(Job.id).join(JobEvent, isouter=True),
    "children of a known job": select(JobEvent).where(JobEvent.job_id == JOB),
    "either": select(Job).where(or_(Job.id == JOB, Job.id != JOB)),
    "update": update(Job).where(Job.id == JOB).values(name=ANYTHING).returning(Job.id),
    "delete": delete(JobEvent).where(JobEvent.job_id == JOB).returning(JobEvent.id),
}


@pytest.mark.parametrize("name", QUERIES)
def test_another_tenants_rows_are_not_there(mine: Session, theirs: dict[str, str], name: str) -> None:
    rows = mine.scalars(QUERIES[name], {"job": theirs["job"]})
    assert [row for row in rows if row is not None] == []


def test_nor_do_they_exist(mine: Session, theirs: dict[str, str]) -> None:
    assert mine.scalar(select(exists().where(Job.id == theirs["job"]))) is False
    assert mine.scalar(select(func.count()).select_from(Job)) == 0


@pytest.mark.parametrize("table", EVERYTHING)
def test_every_table_is_restricted(bind: Engine, theirs: dict[str, str], table: type[Base]) -> None:
    with transaction(bind, MINE) as session:
        assert session.scalars(select(table)).all() == []
        session.execute(delete(table), execution_options={"synchronize_session": False})
    with transaction(bind, THEIRS) as session:
        row = session.scalars(select(table)).first()
        assert row is not None
        session.refresh(row)
        identity = sqlalchemy.inspect(row).identity
    with transaction(bind, MINE) as session:
        assert session.get(table, identity) is None
        assert session.get(table, identity, with_for_update=True) is None


def test_every_table_is_somebodys_or_named_as_nobodys() -> None:
    """A new table has to be one or the other."""
    known = {table.__tablename__ for table in (*tenancy.owned_tables(), *tenancy.CHILDREN)}
    assert known | tenancy.UNOWNED == set(Base.metadata.tables)
    assert not known & tenancy.UNOWNED


def test_relationships_load_what_is_the_tenants(bind: Engine, storage: Storage, theirs: dict[str, str]) -> None:
    dataset = add_dataset(bind, storage, tenant=MINE).id
    with transaction(bind, MINE) as session:
        assert [row.key for row in session.get_one(Dataset, dataset).tokenizations] == ["bytes"]


def test_new_rows_are_the_sessions_tenants(bind: Engine, storage: Storage) -> None:
    dataset = add_dataset(bind, storage, tenant=MINE).id
    with transaction(bind, MINE) as session:
        assert tenant_of(session) == MINE
        spec = {"name": "a job", "model": "performer-tiny"}
        job = jobs.create(session, spec=spec, **planned(), memory_cap_bytes=500_000_000, dataset_id=dataset)
        assert job.tenant == MINE
        assert len(events.page(session, job.id)[0]) == 2
    with transaction(bind) as session:
        assert tenant_of(session) == tenancy.DEFAULT


def test_tenants_share_compiled_statements(bind: Engine, theirs: dict[str, str]) -> None:
    """Else each tenant's every statement would be compiled anew."""
    statement = select(JobEvent).where(JobEvent.job_id == theirs["job"])
    with transaction(bind, THEIRS) as session:
        assert session.scalars(statement).all()
    compiled: Any = bind._compiled_cache
    known = len(compiled)
    for number in range(3):
        tenancy._of_tenant.cache_clear()
        with transaction(bind, f"tenant {number}") as session:
            assert session.scalars(statement).all() == []
    assert len(compiled) == known
