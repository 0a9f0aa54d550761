"""Jobs that many clients look at at once: one query for all that were asked for while the one before ran."""

from __future__ import annotations

import asyncio
from typing import Any

from anyio import CapacityLimiter, to_thread
from sqlalchemy import Engine, Row

from service import jobs
from service.errors import NotFoundError
from service.ids import is_id

AT_ONCE = 100
"""Jobs of one query, at most."""

_Asked = tuple[str, str]
"""Tenant and job."""


class Looks:
    """Of one event loop. Uses one connection of the pool and one thread, however many ask.

    A query and a thread for each request would be most of what an answer costs. Nobody waits for company: who is alone
    is asked for at once, and who comes meanwhile is next.
    """

    def __init__(self, bind: Engine) -> None:
        self._bind = bind
        self._limiter = CapacityLimiter(1)
        self._waiting: dict[_Asked, asyncio.Future[Row[Any] | None]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def job(self, tenant: str, job_id: str) -> Row[Any]:
        """What is shown of a tenant's job. Raises NotFoundError, SQLAlchemyError."""
        if not is_id("job", job_id):
            raise NotFoundError("job", job_id)
        answer = self._waiting.get((tenant, job_id))
        if answer is None:
            answer = self._waiting[tenant, job_id] = asyncio.get_running_loop().create_future()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        found = await asyncio.shield(answer)  # others may be waiting for it, too
        if found is None:
            raise NotFoundError("job", job_id)
        return found

    async def _ask(self) -> None:
        while self._waiting:
            asked = dict(list(self._waiting.items())[:AT_ONCE])
            for each in asked:
                del self._waiting[each]
            try:
                found = await to_thread.run_sync(jobs.look, self._bind, list(asked), limiter=self._limiter)
            except Exception as error:  # noqa: BLE001  # whoever asked raises it
                for answer in asked.values():
                    answer.set_exception(error)
                    answer.exception()  # has been seen, also where everybody has gone away
            else:
                for each, answer in asked.items():
                    answer.set_result(found.get(each))
