"""Events of a job as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Engine
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from starlette.types import Message

from api import event_hub, event_stream
from api.event_hub import EventHub
from api.event_stream import EventStream
from cli.client import Client, Event
from service import database, events, jobs, runs
from service.database import transaction
from service.errors import TooManyStreamsError
from service.ids import new_id
from service.models import Job
from service.settings import Settings
from service.storage import Storage
from tests.integration.seed import add_dataset, add_job, claim
from tests.integration.stage import DatabaseProxy, wait_for

ROOT = Path(__file__).resolve().parents[2]
ASK = {"accept": "text/event-stream"}


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a stream, `data` decoded; other blocks are left out."""
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.split("\n\n") if block]
    return [{**block, "data": json.loads(block["data"])} for block in blocks if "data" in block]


def write(bind: Engine, job_id: str, *steps: int) -> None:
    for step in steps:
        with transaction(bind) as session:
            runs.add_event(session, job_id, 1, "training", {"step": step})


def finish(bind: Engine, job_id: str) -> None:
    with transaction(bind) as session:
        runs.finish(session, job_id, 1, "failed", error={"code": "diverged", "message": "m", "step": 1, "hint": "h"})


def stored(bind: Engine, job_id: str) -> list[int]:
    with transaction(bind) as session:
        return [event.id for event in events.page(session, job_id, limit=10_000)[0]]


@pytest.fixture
def running(bind: Engine, job: Job) -> str:
    claim(bind, job.id)
    return job.id


def test_a_job_that_is_over_is_replayed_from_any_event_and_ends(client: TestClient, bind: Engine, running: str) -> None:
    write(bind, running, *range(event_hub.PAGE + 10))
    finish(bind, running)
    url, ids = f"/jobs/{running}/events", stored(bind, running)
    answer = client.get(url, headers=ASK)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
    assert answer.text.startswith("retry: 2000\n\n")
    assert answer.text.count("retry") == 1
    *sent, end = parse(answer.text)
    assert [int(event["id"]) for event in sent] == ids
    listed = client.get(url, params={"limit": 1_000}).json()["data"]
    assert [event["data"] for event in sent] == listed
    assert [event["event"] for event in sent] == [event["type"] for event in listed]
    assert end == {"event": "end", "data": {"status": "failed"}, "id": f"{ids[-1]}.end"}

    for headers, params in (({"last-event-id": str(ids[4])}, {"after": ids[7]}), ({}, {"after": ids[4]})):
        rest = parse(client.get(url, headers=ASK | headers, params=params).text)
        assert [event["id"] for event in rest] == [*map(str, ids[5:]), f"{ids[-1]}.end"]
    ahead = parse(client.get(url, headers=ASK | {"last-event-id": "9" * 19}).text)
    assert ahead == [end]
    gone = client.get(url, headers=ASK | {"last-event-id": end["id"]})
    assert (gone.status_code, gone.content) == (204, b"")


@pytest.mark.parametrize("garbage", ["x", "-1", "1.5", "1.end.end", ".end", "9" * 20, "1 ", "\uff11"])
def test_garbage_in_last_event_id_is_a_problem(shared_client: TestClient, garbage: str) -> None:
    headers = {**ASK, "last-event-id": garbage.encode()}
    answer = shared_client.get(f"/jobs/{new_id('job')}/events", headers=headers)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


def test_a_stream_of_no_job_is_a_problem_as_everywhere(shared_client: TestClient) -> None:
    for identifier in (new_id("job"), "job_x"):
        answer = shared_client.get(f"/jobs/{identifier}/events", headers=ASK)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_who_does_not_ask_for_a_stream_gets_a_list_and_head_neither(
    client: TestClient, bind: Engine, running: str
) -> None:
    for accept in ("application/json", "*/*", "text/event-stream;q=0.1, application/json", "text/html"):
        assert client.get(f"/jobs/{running}/events", headers={"accept": accept}).json()["has_more"] is False
    assert client.head(f"/jobs/{running}/events", headers=ASK).status_code == 405


class Reader:
    """A stream without a server: what the application sends, and a client that may go away."""

    def __init__(self, hub: EventHub, job_id: str, heartbeat_seconds: float = 60.0) -> None:
        self.text = ""
        stream = EventStream(hub, "default", job_id, 0, 0, heartbeat_seconds)
        self.task = asyncio.create_task(stream({"type": "http"}, asyncio.Event().wait, self.send))  # type: ignore[arg-type]

    async def send(self, message: Message) -> None:
        self.text += message.get("body", b"").decode()

    @property
    def ids(self) -> list[str]:
        return [event["id"] for event in parse(self.text)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # on what has no event
            await asyncio.sleep(0.01)


def on_a_hub(bind: Engine, act: Callable[[EventHub], Awaitable[None]]) -> None:
    async def run() -> None:
        hub = EventHub(bind, limit=100)
        try:
            await act(hub)
        finally:
            hub.close()

    asyncio.run(run())


def test_many_streams_are_one_query_a_second(
    bind: Engine, storage: Storage, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_hub, "POLL_SECONDS", 0.02)
    other = add_job(bind, add_dataset(bind, storage).id).id
    asked: list[set[str]] = []

    async def act(hub: EventHub) -> None:
        ask = hub._ask

        def counted(positions: dict[str, int]) -> Any:
            asked.append(set(positions))
            return ask(positions)

        monkeypatch.setattr(hub, "_ask", counted)
        readers = [Reader(hub, job_id) for job_id in (running, other) for _ in range(20)]
        await until(lambda: all(len(reader.ids) >= 2 for reader in readers))
        asked.clear()
        await asyncio.to_thread(write, bind, running, 1, 2)
        await until(lambda: all(len(reader.ids) == 5 for reader in readers[:20]))
        await asyncio.to_thread(finish, bind, running)
        await until(lambda: all(reader.task.done() for reader in readers[:20]))
        assert {*map(frozenset, asked)} <= {frozenset({running, other}), frozenset({other})}
        assert hub.streams == 20
        hub.close()
        await asyncio.gather(*(reader.task for reader in readers))
        assert not any("end" in reader.text for reader in readers[20:])
        assert (hub.streams, hub._watches) == (0, {})

    on_a_hub(bind, act)


def test_who_falls_behind_reads_on_from_the_database(
    bind: Engine, running: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_hub, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(event_hub, "TAIL", 3)

    async def act(hub: EventHub) -> None:
        may_read = asyncio.Event()

        class Slow(Reader):
            async def send(self, message: Message) -> None:
                await super().send(message)
                if "started" in self.text:
                    await may_read.wait()

        slow, quick = Slow(hub, running), Reader(hub, running)
        await until(lambda: len(slow.ids) == 3 == len(quick.ids))
        await asyncio.to_thread(write, bind, running, *range(30))
        await until(lambda: len(quick.ids) == 33)
        assert (len(slow.ids), len(hub._watches[running].tail)) == (3, 3)
        may_read.set()
        await asyncio.to_thread(finish, bind, running)
        await asyncio.gather(slow.task, quick.task)
        assert slow.ids == quick.ids == [*map(str, stored(bind, running)), f"{stored(bind, running)[-1]}.end"]

    on_a_hub(bind, act)


def test_a_stream_lives_through_an_outage_and_one_that_has_to_read_ends_without_an_end(
    settings: Settings, bind: Engine, running: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_hub, "POLL_SECONDS", 0.02)
    sockets = Path(tempfile.mkdtemp(prefix="slimtune-proxy-"))
    proxy = DatabaseProxy(settings.database_url, sockets)
    behind = database.engine(settings.model_copy(update={"database_url": proxy.url}))

    async def act(hub: EventHub) -> None:
        reader = Reader(hub, running)
        await until(lambda: len(reader.ids) == 3)
        proxy.refuse()
        await until(lambda: "streams wait for the database" in caplog.text)
        late = Reader(hub, running)
        # It has seen nothing, and what the hub has begins after what there was.
        hub._watches[running].since = stored(bind, running)[-1]
        await late.task
        assert "end" not in late.text
        proxy.answer()
        await asyncio.to_thread(finish, bind, running)
        await reader.task
        assert reader.ids == [*map(str, stored(bind, running)), f"{stored(bind, running)[-1]}.end"]

    on_a_hub(behind, act)
    behind.dispose()
    proxy.close()
    shutil.rmtree(sockets)


def test_a_client_that_reads_nothing_is_let_go(bind: Engine, running: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SEND_SECONDS", 0.05)

    async def act(hub: EventHub) -> None:
        class Deaf(Reader):
            async def send(self, message: Message) -> None:
                if "body" in message:
                    await asyncio.Event().wait()

        deaf = Deaf(hub, running)
        with pytest.raises(ClientDisconnect):
            await deaf.task
        assert hub.streams == 0

    on_a_hub(bind, act)


def test_a_stream_does_not_last_for_ever(bind: Engine, running: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "LONGEST_SECONDS", 0.05)

    async def act(hub: EventHub) -> None:
        reader = Reader(hub, running)
        await reader.task
        assert reader.text == "retry: 2000\n\n"

    on_a_hub(bind, act)


class Api:
    """The API in processes of its own, one after the other on one port."""

    def __init__(self, settings: Settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = os.environ | {
            "DATABASE_URL": settings.database_url,
            "REDIS_URL": settings.redis_url,
            "SLIMTUNE_DATA_DIR": str(settings.data_dir),
            "SLIMTUNE_EVENT_HEARTBEAT_SECONDS": "0.2",
            "SLIMTUNE_EVENT_STREAMS": "1",
        }
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "uvicorn", "api.app:create_app", "--factory", "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for("the API", self._listens, seconds=60)

    def _listens(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def stop(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    api = Api(settings)
    yield api
    if api.process.poll() is None:
        api.stop(signal.SIGKILL)


def test_restarts_of_the_api_lose_and_double_no_event(api: Api, bind: Engine, running: str) -> None:
    seen: list[Event] = []

    def watch() -> None:
        with Client(api.url) as client:
            for event in client.jobs.get(running).watch():
                seen.append(event)  # noqa: PERF402  # one by one: the test looks on

    watcher = threading.Thread(target=watch)
    watcher.start()
    for round_, how in enumerate((signal.SIGKILL, signal.SIGTERM)):
        write(bind, running, *range(10))
        wait_for("what was written", lambda expected=3 + 20 * round_ + 10: len(seen) == expected)  # type: ignore[misc]
        api.stop(how)  # fails if uvicorn's own stop waits for the stream
        write(bind, running, *range(10))
        api.start()
    write(bind, running, 0)
    finish(bind, running)
    watcher.join(30)
    assert not watcher.is_alive()
    assert [event["id"] for event in seen] == stored(bind, running)


def test_a_tenant_has_half_of_the_places(bind: Engine) -> None:
    hub = EventHub(bind, limit=4)
    with contextlib.ExitStack() as stack:
        for tenant in ("acme", "acme", "other"):
            stack.enter_context(hub.place(tenant))
        with pytest.raises(TooManyStreamsError, match="2 streams"):
            stack.enter_context(hub.place("acme"))
        stack.enter_context(hub.place("other"))
        with pytest.raises(TooManyStreamsError, match="4 streams"):
            stack.enter_context(hub.place("third"))
        assert hub.streams == 4
    assert hub.streams == 0


def test_heartbeats_and_places(api: Api, bind: Engine, running: str) -> None:
    url = f"{api.url}/jobs/{running}/events"
    with httpx2.stream("GET", url, headers=ASK, timeout=10) as answer:
        lines = answer.iter_lines()
        while next(lines) != ": heartbeat":
            pass
        refused = httpx2.get(url, headers=ASK)
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
        assert refused.headers["retry-after"] == "5"
        with transaction(bind) as session:
            jobs.request(session, running, "pause")
            runs.finish(session, running, 1, "paused")
        while next(lines) != "event: paused":
            pass
        while next(lines) != ": heartbeat":  # it may be resumed
            pass
    wait_for("the place of who went away", lambda: _is_streamed(url))


def _is_streamed(url: str) -> bool:
    with httpx2.stream("GET", url, headers=ASK, timeout=10) as answer:
        return answer.status_code == 200
