"""A client that sends at times fixed beforehand, whatever the server does: what a request waits because an earlier one
was slow is part of its latency (an open loop; no coordinated omission).

    python -m benchmarks.load_client        a process of its own; benchmarks/load.py starts it

HTTP/1.1 on kept connections, in one thread, and no more than that: what the client takes it takes from the cores that
are measured, about 0.3 ms a request.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

from benchmarks.bench_measure import ROOT

CONNECTIONS = 32
TIMEOUT_SECONDS = 30.0
START_SECONDS = 0.2
"""Before the first request is due: the connections are opened meanwhile."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, and when, in seconds from the start."""

    kind: str
    due: float
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    kind: str
    due: float
    """Seconds from the start."""
    latency_seconds: float
    """From when it was due to the last byte of the answer."""
    late_seconds: float
    """By how much this client was late, before it even looked for a connection."""
    status: int
    """Of HTTP; 0 where there was no answer."""


@dataclass(frozen=True, slots=True)
class Played:
    """What became of all of them."""

    outcomes: list[Outcome]
    seconds: float
    """From the start to the last answer."""
    cpu_seconds: float
    """Of the client's process, while it sent."""


def get(path: str) -> str:
    """The text of a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"


def post(path: str, body: str) -> str:
    """The text of a POST of JSON."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}"


def play(port: int, requests: Sequence[Request]) -> Played:
    """Have a process send them all, in the order of their times, and wait for it."""
    spec = json.dumps({"port": port, "requests": [asdict(request) for request in requests]})
    command = [sys.executable, "-m", "benchmarks.load_client"]
    done = subprocess.run(command, cwd=ROOT, input=spec, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout)
    return Played([Outcome(*outcome) for outcome in said["outcomes"]], said["seconds"], said["cpu_seconds"])


def main() -> None:
    """Requests on stdin, outcomes on stdout."""
    spec = json.load(sys.stdin)
    requests = [Request(**request) for request in spec["requests"]]
    gc.disable()  # a pause of this process would be counted as the server's
    began = time.process_time()
    outcomes = asyncio.run(_play(spec["port"], requests))
    used = time.process_time() - began
    seconds = max((outcome.due + outcome.latency_seconds for outcome in outcomes), default=0.0)
    json.dump({"outcomes": [astuple(o) for o in outcomes], "seconds": seconds, "cpu_seconds": used}, sys.stdout)


async def _play(port: int, requests: Sequence[Request]) -> list[Outcome]:
    loop = asyncio.get_running_loop()
    # First in, first out: none is idle for so long that the server closes it.
    pool: asyncio.Queue[_Connection] = asyncio.Queue()
    start = loop.time() + START_SECONDS
    for _ in range(CONNECTIONS):
        pool.put_nowait(await _connect(port))

    async def send(request: Request) -> Outcome:
        late = loop.time() - start - request.due
        connection = await pool.get()
        try:
            status = await connection.ask(request.text.encode())
        except (OSError, TimeoutError):
            status = 0
            connection.close()
            connection = await _connect(port)
        pool.put_nowait(connection)
        return Outcome(request.kind, request.due, loop.time() - start - request.due, late, status)

    sent = []
    for request in requests:
        await asyncio.sleep(start + request.due - loop.time())
        sent.append(loop.create_task(send(request)))
    outcomes = [await task for task in sent]
    while not pool.empty():
        pool.get_nowait().close()
    return outcomes


class _Connection(asyncio.Protocol):
    """One request after the other. The server says how long its answers are (no chunked ones)."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed without an answer"))

    async def ask(self, data: bytes) -> int:
        """The status of the answer, once all of it is here. Raises OSError, TimeoutError."""
        if self._transport is None:
            raise ConnectionResetError("not connected")
        self._answer = asyncio.get_running_loop().create_future()
        self._buffer.clear()
        self._transport.write(data)
        return await asyncio.wait_for(self._answer, TIMEOUT_SECONDS)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if end and len(body) >= _length(head) and self._answer is not None and not self._answer.done():
            self._answer.set_result(int(head[9:12]))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _length(head: bytearray) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    if not found:
        raise ValueError(f"an answer of unknown length: {head!r}")
    return int(rest.partition(b"\r\n")[0])


async def _connect(port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


if __name__ == "__main__":
    main()
