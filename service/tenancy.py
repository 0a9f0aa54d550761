"""Sessions that see one tenant: whatever is read, changed or deleted through the ORM in such a session is restricted to
that tenant's rows, by the session itself. Another tenant's id is not there, also for a query that forgets to ask.

Not covered, as SQLAlchemy's ORM does not see them: SQL text, statements on `Table` objects, and INSERT, whose rows say
themselves whose they are (`tenant_of`).
"""

from __future__ import annotations

import functools
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Engine, bindparam, event, inspect, select
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.orm.interfaces import CriteriaOption
from sqlalchemy.sql.visitors import InternalTraversal

from service.limits import UNLIMITED, Limits
from service.models import (
    Base,
    Checkpoint,
    Dataset,
    Id,
    Job,
    JobEvent,
    Metric,
    Owned,
    Tokenization,
    Webhook,
    WebhookDelivery,
)

DEFAULT = "default"
"""The tenant of what was there before there were tenants, and of who needs no key."""
EVERY_TENANT: dict[str, Any] = {"every_tenant": True}
"""Execution options of a statement about the machines, which sums up over all tenants."""

CHILDREN: dict[type[Base], tuple[str, type[Base]]] = {
    JobEvent: ("job_id", Job),
    Metric: ("job_id", Job),
    Checkpoint: ("job_id", Job),
    Tokenization: ("dataset_id", Dataset),
    WebhookDelivery: ("webhook_id", Webhook),
}
"""Tables without a tenant of their own: the column that names their parent, and the parent's table."""
UNOWNED = frozenset({"devices", "calibrations", "shape_calibrations", "tenant_usage", "api_keys", "web_sessions"})
"""Tables that are about the machines, or for the operator."""


class TenantSession(Session):
    """A session of one tenant."""

    def __init__(self, bind: Engine, tenant: str, limits: Limits, **options: Any) -> None:
        super().__init__(bind, **options)
        self.tenant = tenant
        self.limits = limits


def tenant_of(session: Session) -> str:
    """Whose a new row is that this session makes. Sessions of workers and of the sweeper belong to no tenant."""
    return session.tenant if isinstance(session, TenantSession) else DEFAULT


def limits_of(session: Session) -> Limits:
    """What the caller, for whom the session is, may have."""
    return session.limits if isinstance(session, TenantSession) else UNLIMITED


def owned_tables() -> list[Any]:
    """The mapped classes that have a column `tenant` of their own by which they are restricted."""
    return [mapper.class_ for mapper in Base.registry.mappers if issubclass(mapper.class_, Owned)]


class _OfTenant(CriteriaOption):
    """`with_loader_criteria` for all tables at once.

    To the cache of compiled statements it is its one bound parameter: all tenants share what is compiled, and a
    statement costs a fifth more time, not one and a half times as much as with an option for each table.
    """

    inherit_cache = False
    _traverse_internals = [("tenant", InternalTraversal.dp_clauseelement)]  # noqa: RUF012  # SQLAlchemy's shape
    propagate_to_loaders = False

    def __init__(self, tenant: str) -> None:
        self.tenant = bindparam("session_tenant", tenant, Id)
        conditions = [(table, table.tenant == self.tenant) for table in owned_tables()]
        conditions += [(child, _parent_is(child, self.tenant)) for child in CHILDREN]
        self._options = [
            with_loader_criteria(table, condition, include_aliases=True, propagate_to_loaders=False)
            for table, condition in conditions
        ]

    def process_compile_state(self, compile_state: Any) -> None:
        """Of a SELECT."""
        self.get_global_criteria(compile_state.global_attributes)

    def get_global_criteria(self, attributes: dict[Any, Any]) -> None:
        """Of an UPDATE or DELETE."""
        for option in self._options:
            option.get_global_criteria(attributes)


_of_tenant = functools.lru_cache(maxsize=1_024)(_OfTenant)


@event.listens_for(TenantSession, "do_orm_execute")
def _restrict(state: ORMExecuteState) -> None:
    """Also for what relationships load: nothing is passed on from the statement that loaded a row. Not for `refresh`,
    whose row the session has found before, or made."""
    if (state.is_select or state.is_update or state.is_delete) and not state.execution_options.get("every_tenant"):
        session = state.session
        assert isinstance(session, TenantSession)  # noqa: S101  # what the listener is for
        state.statement = state.statement.options(_of_tenant(session.tenant))


def _parent_is(child: type[Base], tenant: BindParameter[str]) -> ColumnElement[bool]:
    """Through an alias of the parent's bare table: neither correlated with, nor restricted as, what the statement has
    of it otherwise."""
    column, parent = CHILDREN[child]
    owners = inspect(parent).local_table.alias()
    mine = select(owners.c.id).where(owners.c.tenant == tenant)
    condition: ColumnElement[bool] = getattr(child, column).in_(mine)
    return condition
