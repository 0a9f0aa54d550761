"""The limits of a connection, without a socket: what came, in the portions in which it came, and what was written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from api import protocol
from api.middleware import MAX_HEAD_BYTES
from api.protocol import LimitedHttp

CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Wire(asyncio.Transport):
    """The server's end of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Service:
    """Reads bodies, remembers heads, and answers as soon as it may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.answering = asyncio.Event()
        self.heads: list[list[tuple[bytes, bytes]]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message: Message = {"more_body": True}
        while message.get("more_body"):
            message = await receive()
        self.heads.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        self.answering.set()
        await self.may_answer.wait()
        await send({"type": "http.response.body", "body": b"done"})


def connected(steps: Callable[[LimitedHttp, Wire, Service], Awaitable[None]]) -> None:
    async def run() -> None:
        service = Service()
        config = Config(service, http=LimitedHttp, log_config=None, lifespan="off")
        connection, wire = LimitedHttp(config, ServerState(), {}), Wire()
        connection.connection_made(wire)
        async with asyncio.timeout(10):
            await steps(connection, wire, service)
        connection.connection_lost(None)

    asyncio.run(run())


async def settle(connection: LimitedHttp) -> None:
    """Until the service has done with every request that it has."""
    while connection.tasks:
        await asyncio.wait(set(connection.tasks))


def test_trailers_are_no_part_of_the_head() -> None:
    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        connection.data_received(CHUNKED + b"Idempotency-Key: k\r\nAuthoriz")
        connection.data_received(b"ation: Bearer x\r\n\r\n" + GET)
        await settle(connection)
        assert [[name for name, _ in head] for head in service.heads] == [[b"host", b"transfer-encoding"], [b"host"]]
        assert wire.written.count(b"200 OK") == 2
        assert not wire.is_closing()

    connected(steps)


@pytest.mark.parametrize("portion", [b"A: b\r\n" * 1_000, b"a" * 6_000], ids=["lines", "one line"])
@pytest.mark.parametrize("answered", [False, True])
def test_trailers_without_end_close_the_connection(portion: bytes, answered: bool) -> None:
    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        connection.data_received(CHUNKED + b"X: ")
        if answered:  # a request may be refused before its body is there
            connection.cycle.more_body = False
            connection.cycle.message_event.set()
            await settle(connection)
        written, sent = wire.written, 0
        while not wire.is_closing():
            connection.data_received(portion)
            sent += len(portion)
            assert sent <= MAX_HEAD_BYTES + len(portion)
        assert len(connection.headers) == 2
        assert wire.written == written

    connected(steps)


def test_trailers_that_drip_close_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.01)

    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        connection.data_received(CHUNKED)
        connection.data_received(b"X")
        await wire.closed.wait()
        assert wire.written == b""

    connected(steps)


def test_chunks_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_HEAD_BYTES", 10)

    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        for portion in (CHUNKED[:-3], b"5", b"\r\n", b"a", b"bcde\r\n5\r\nabcde\r\n", b"0\r\n", b"\r\n"):
            connection.data_received(portion)
        await settle(connection)
        assert wire.written.endswith(b"done")
        assert not wire.is_closing()

    connected(steps)


async def _by_time(connection: LimitedHttp) -> None:
    pass


async def _by_size(connection: LimitedHttp) -> None:
    for _ in range(2):
        connection.data_received(b"x" * MAX_HEAD_BYTES)


async def _by_form(connection: LimitedHttp) -> None:
    connection.data_received(b"\0\r\n")


@pytest.mark.parametrize("fault", [_by_time, _by_size, _by_form])
def test_nothing_is_written_into_an_answer_under_way(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[LimitedHttp], Awaitable[None]]
) -> None:
    if fault is _by_time:
        monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.01)

    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        service.may_answer.clear()
        connection.data_received(GET)
        await service.answering.wait()
        begun = wire.written
        connection.data_received(b"GET / HTTP/1.1\r\nX: ")
        await fault(connection)
        await wire.closed.wait()
        assert wire.written == begun
        service.may_answer.set()
        await settle(connection)

    connected(steps)


def test_whoever_is_not_read_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        service.may_answer.clear()
        connection.data_received(2 * GET + GET[:10])  # two heads: nothing is read until the first is answered
        timers: list[Any] = []
        monkeypatch.setattr(connection.loop, "call_later", lambda *call: timers.append(call))
        connection._late()
        assert (len(timers), wire.is_closing()) == (1, False)
        service.may_answer.set()

    connected(steps)


def test_a_body_is_no_part_of_the_next_head() -> None:
    body = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000

    async def steps(connection: LimitedHttp, wire: Wire, service: Service) -> None:
        connection.data_received(body + GET[:10])
        await settle(connection)
        connection.data_received(GET[10:] + body + GET[:10])
        connection.data_received(GET[10:])
        await settle(connection)
        assert wire.written.count(b"HTTP/1.1 200 OK") == wire.written.count(b"HTTP/1.1") == 4

    connected(steps)
