"""GET /jobs/{id} of many at once: one query at a time, for all that came meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from api.looks import AT_ONCE, Looks
from service import jobs
from service.errors import NotFoundError
from service.ids import new_id
from service.models import Job
from service.storage import Storage
from tests.integration.seed import add_job


class Watched:
    """`service.jobs.look`, which notes what it is asked for, and waits to be let on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[set[tuple[str, str]]] = []
        self.began = threading.Event()
        self.go_on = threading.Event()
        self.fail = False
        self._look = jobs.look
        monkeypatch.setattr("service.jobs.look", self.look)

    def look(self, bind: Engine, asked: Collection[tuple[str, str]]) -> Any:
        self.asked.append(set(asked))
        self.began.set()
        assert self.go_on.wait(10)
        if self.fail:
            raise OperationalError("SELECT", {}, Exception("the database is away"))
        return self._look(bind, asked)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_who_comes_while_a_query_runs_is_in_the_next_one(
    bind: Engine, storage: Storage, job: Job, watched: Watched
) -> None:
    others = [add_job(bind, job.dataset_id, tenant=tenant) for tenant in ("default", "another")]

    async def run() -> Any:
        looks = Looks(bind)
        first = asyncio.create_task(looks.job("default", job.id))
        await asyncio.to_thread(watched.began.wait, 10)
        later = [asyncio.create_task(looks.job("default", each.id)) for each in [*others, job] * 5]
        gone = asyncio.create_task(looks.job("default", job.id))  # a client that goes away takes nobody along
        await asyncio.sleep(0)
        gone.cancel()
        watched.go_on.set()
        return await asyncio.gather(first, *later, return_exceptions=True)

    first, *later = asyncio.run(run())
    assert first.id == job.id
    assert watched.asked == [{("default", job.id)}, {("default", each.id) for each in (job, *others)}]
    for found, wanted in zip(later, [*others, job] * 5, strict=True):
        if wanted.tenant == "another":
            assert isinstance(found, NotFoundError)
        else:
            assert found.id == wanted.id


def test_a_failed_query_is_everybodys_and_the_next_one_is_asked(bind: Engine, job: Job, watched: Watched) -> None:
    watched.go_on.set()
    watched.fail = True

    async def run() -> None:
        looks = Looks(bind)
        asked = [looks.job("default", identifier) for identifier in (job.id, new_id("job"), job.id)]
        failed = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(error) for error in failed] == [OperationalError] * 3
        watched.fail = False
        assert (await looks.job("default", job.id)).id == job.id

    asyncio.run(run())


def test_a_query_has_a_hundred_at_most(bind: Engine, job: Job, watched: Watched) -> None:
    watched.go_on.set()

    async def run() -> None:
        looks = Looks(bind)
        asked = [looks.job("default", new_id("job")) for _ in range(2 * AT_ONCE)]
        answers = await asyncio.gather(*asked, looks.job("default", job.id), return_exceptions=True)
        assert [type(answer) for answer in answers[:-1]] == [NotFoundError] * (2 * AT_ONCE)
        with pytest.raises(NotFoundError):
            await looks.job("default", "no id")

    asyncio.run(run())
    assert [len(asked) for asked in watched.asked] == [AT_ONCE, AT_ONCE, 1]
