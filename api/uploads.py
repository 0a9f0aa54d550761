"""A multipart upload as it arrives: the file's bytes go to their sink, nothing waits in memory or in a spool file.

Starlette's UploadFile would spool the whole file before a route can look at its size.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Literal, Protocol, Self, TypeVar

import anyio
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError, MultipartParseError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.errors import InvalidRequestError, UploadStalledError

BATCH_BYTES = 1024**2
"""Bytes to collect before a thread is asked to write them."""
MAX_FIELD_BYTES = 1_000
STALL_SECONDS = 60.0

# It logs each part at debug level and bytes that it skips at warning level: a client could fill the log.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class Sink(Protocol):
    """Where the file goes, for example service.datasets.DatasetUpload."""

    def write(self, data: bytes) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


SinkT = TypeVar("SinkT", bound=Sink)
Stored = TypeVar("Stored")


class Form:
    """The parts `file` and `name` of a multipart body, by callbacks of the parser."""

    def __init__(self, content_type: str) -> None:
        """Raises InvalidRequestError for another content type."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequestError(("file", "send the file as multipart/form-data in the field `file`"))
        self.filename: str | None = None
        self.complete = False
        self._name: bytearray | None = None
        self._chunks: list[bytes] = []
        self._part: Literal["file", "name"] | None = None
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._begin_part,
                "on_header_begin": self._begin_header,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open_part,
                "on_part_data": self._take,
                "on_end": self._end,
            },
        )

    @property
    def name(self) -> str | None:
        """The text of the field `name`, if it was sent."""
        return None if self._name is None else self._name.decode("utf-8", "replace")

    def feed(self, data: bytes) -> list[bytes]:
        """Take a portion of the body; returns the file's bytes in it. Raises InvalidRequestError."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise InvalidRequestError(("file", "the multipart body is malformed")) from error
        chunks, self._chunks = self._chunks, []
        return chunks

    def _begin_part(self) -> None:
        self._disposition = b""

    def _begin_header(self) -> None:
        self._header = (bytearray(), bytearray())

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name, filename = options.get(b"name"), options.get(b"filename")
        if name == b"file" and self.filename is None and filename is not None:
            self._part = "file"
            self.filename = filename.decode("utf-8", "replace")
        elif name == b"file":
            raise InvalidRequestError(("file", "must be one file, with a file name"))
        elif name == b"name" and self._name is None:
            self._part = "name"
            self._name = bytearray()
        else:
            raise InvalidRequestError(((name or b"").decode("utf-8", "replace"), "is not a field of this form"))

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file":
            self._chunks.append(data[start:end])
        elif self._name is not None:
            self._name += data[start:end]
            if len(self._name) > MAX_FIELD_BYTES:
                raise InvalidRequestError(("name", f"must be at most {MAX_FIELD_BYTES} bytes"))

    def _end(self) -> None:
        self.complete = True


def open_form(content_type: str) -> Form:
    """A form for this content type. Raises InvalidRequestError."""
    try:
        return Form(content_type)
    except FormParserError as error:
        raise InvalidRequestError(("file", "the multipart boundary is too long")) from error


async def receive_upload(
    request: Request, open_sink: Callable[[str], SinkT], store: Callable[[SinkT, str | None], Stored]
) -> Stored:
    """Stream the file of a request into `open_sink(filename)`, then `store(sink, name)`; both run in threads.

    Raises InvalidRequestError for a malformed form, UploadStalledError, ClientDisconnect, what the callables raise.
    """
    form = open_form(request.headers.get("content-type", ""))
    portions = request.stream()
    head: list[bytes] = []
    while form.filename is None and not form.complete:
        head += form.feed(await _next(portions))
    if form.filename is None:
        raise InvalidRequestError(("file", "is missing"))
    with await run_in_threadpool(open_sink, form.filename) as sink:
        await _copy(form, portions, head, sink)
        return await run_in_threadpool(store, sink, form.name)


async def _copy(form: Form, portions: AsyncIterator[bytes], head: list[bytes], sink: Sink) -> None:
    batch, size = head, sum(map(len, head))
    while not form.complete:
        chunks = form.feed(await _next(portions))
        batch += chunks
        size += sum(map(len, chunks))
        if size >= BATCH_BYTES:
            await run_in_threadpool(sink.write, b"".join(batch))
            batch, size = [], 0
    await run_in_threadpool(sink.write, b"".join(batch))


async def _next(portions: AsyncIterator[bytes]) -> bytes:
    """The next portion of the body. Raises InvalidRequestError at its end: the form was not closed."""
    try:
        with anyio.fail_after(STALL_SECONDS):
            return await anext(portions)
    except TimeoutError as error:
        raise UploadStalledError(STALL_SECONDS) from error
    except StopAsyncIteration as error:
        raise InvalidRequestError(("file", "the multipart body ends too early")) from error
