"""HTTP/1.1 as uvicorn speaks it, with limits on field lines: `uvicorn --http api.protocol:LimitedHttp`.

uvicorn's parser has none: a head that never ends would fill the memory, and one that never comes would keep its
connection. So would trailers, the fields behind the last chunk of a body; these are dropped (RFC 9110, 6.5.1: only who
knows their meaning may merge them into the head). What is over a limit by little and complete is answered by
`api.middleware.RequestContext`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.middleware import MAX_HEAD_BYTES

HEAD_SECONDS = 30.0
"""From the connection, or from the first byte of a further request on it, to the end of the headers; and the same for
trailers."""


@dataclass(slots=True, eq=False)
class _Fields:
    """A head, or what follows the size of a chunk: trailers, unless it is that chunk."""

    is_head: bool
    bytes: int = 0
    timer: asyncio.TimerHandle | None = None


class LimitedHttp(HttpToolsProtocol):
    """Closes a connection whose request has no end of its head or trailers in time or in size."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._fields: _Fields | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._begin(is_head=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Of data that had the beginning of the fields nothing is counted: an unknown part of it is what was before."""
        before = self._fields
        super().data_received(data)
        fields = self._fields
        if fields is None or fields is not before:
            return
        if fields.timer is None:  # with no byte of a chunk in the data these are trailers
            self._limit_time(fields)
        fields.bytes += len(data)
        if fields.bytes > MAX_HEAD_BYTES:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._fields is None:
            self._begin(is_head=True)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._fields is not None and self._fields.is_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end()
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._begin(is_head=False)

    def on_body(self, body: bytes) -> None:
        self._end()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._owes_an_answer():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _begin(self, *, is_head: bool) -> None:
        self._fields = _Fields(is_head)
        if is_head:
            self._limit_time(self._fields)

    def _limit_time(self, fields: _Fields) -> None:
        fields.timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _end(self) -> None:
        if self._fields is not None and self._fields.timer is not None:
            self._fields.timer.cancel()
        self._fields = None

    def _late(self) -> None:
        if self._fields is not None and self.flow.read_paused:  # it is this side that reads nothing
            self._limit_time(self._fields)
        else:
            self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        """Closes; with an answer, unless it would stand in an earlier one, or where one was that is complete."""
        is_head = self._fields is not None and self._fields.is_head
        self._end()
        if self.transport.is_closing():
            return
        if is_head and not self._owes_an_answer():
            self.transport.write(b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
        self.transport.close()

    def _owes_an_answer(self) -> bool:
        """That of the newest request is the last one to come."""
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete  # type: ignore[redundant-expr]  # None before the first
