"""A multipart upload as it arrives: the files' bytes go to their sink, nothing waits in memory or in a spool file.

Starlette's UploadFile would spool the whole file before a route can look at its size.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from anyio import CancelScope, CapacityLimiter, fail_after, to_thread
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


def form_body(
    file: dict[str, Any], *, field: str = "file", required: Sequence[str] = (), **texts: dict[str, Any]
) -> dict[str, Any]:
    """What OpenAPI says of a multipart form with these fields, of which `field` must be there, and `required`."""
    schema = {
        "type": "object",
        "required": [field, *required],
        "properties": {field: file, **texts},
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class Sink(Protocol):
    """Where a file goes, for example service.datasets.DatasetUpload."""

    def write(self, data: bytes) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FilesSink(Sink, Protocol):
    """Where several files go, one after the other, for example service.model_uploads.ModelUpload."""

    def begin(self, filename: str) -> None:
        """What is written from now on belongs to this file."""


SinkT = TypeVar("SinkT", bound=Sink)
FilesSinkT = TypeVar("FilesSinkT", bound=FilesSink)
Stored = TypeVar("Stored")


@dataclass(frozen=True, slots=True)
class FileStart:
    """A file begins; the bytes that follow are its."""

    filename: str


Piece = FileStart | bytes


class Form:
    """The part with the file and some short texts of a multipart body, by callbacks of the parser."""

    def __init__(
        self, content_type: str, max_files: int = 1, texts: Sequence[str] = ("name",), field: str = "file"
    ) -> None:
        """The file is in `field`, up to `max_files` times; each of `texts` may come once. Raises InvalidRequestError
        for another content type."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequestError((field, f"send the file as multipart/form-data in the field `{field}`"))
        self.field = field
        self.files = 0
        """That have begun."""
        self.complete = False
        self._max_files = max_files
        self._allowed = frozenset(texts)
        self._texts: dict[str, bytearray] = {}
        self._pieces: list[Piece] = []
        self._part = ""
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
        return self.text("name")

    def text(self, field: str) -> str | None:
        """The text of a field, if it was sent."""
        value = self._texts.get(field)
        return None if value is None else value.decode("utf-8", "replace")

    def feed(self, data: bytes) -> list[Piece]:
        """Take a portion of the body; returns the files' bytes in it. Raises InvalidRequestError."""
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise InvalidRequestError((self.field, "the multipart body is malformed")) from error
        pieces, self._pieces = self._pieces, []
        return pieces

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
        is_file = name == self.field.encode()
        if is_file and self.files < self._max_files and filename is not None:
            self._part = self.field
            self.files += 1
            self._pieces.append(FileStart(filename.decode("utf-8", "replace")))
        elif is_file:
            allowed = "one file" if self._max_files == 1 else f"at most {self._max_files} files"
            raise InvalidRequestError((self.field, f"must be {allowed}, with a file name"))
        else:
            self._part = (name or b"").decode("utf-8", "replace")
            if self._part not in self._allowed or self._part in self._texts:
                raise InvalidRequestError((self._part, "is not a field of this form, or is there twice"))
            self._texts[self._part] = bytearray()

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part == self.field:
            self._pieces.append(data[start:end])
        else:
            text = self._texts[self._part]
            text += data[start:end]
            if len(text) > MAX_FIELD_BYTES:
                raise InvalidRequestError((self._part, f"must be at most {MAX_FIELD_BYTES} bytes"))

    def _end(self) -> None:
        self.complete = True


def open_form(content_type: str, max_files: int = 1, texts: Sequence[str] = ("name",), field: str = "file") -> Form:
    """A form for this content type. Raises InvalidRequestError."""
    try:
        return Form(content_type, max_files, texts, field)
    except FormParserError as error:
        raise InvalidRequestError((field, "the multipart boundary is too long")) from error


async def receive_upload(
    request: Request,
    open_sink: Callable[[str], SinkT],
    store: Callable[..., Stored],
    texts: Sequence[str] = ("name",),
    field: str = "file",
    limiter: CapacityLimiter | None = None,
) -> Stored:
    """Stream the file of a request, which is in `field`, into `open_sink(filename)`, then `store(sink, *values of
    texts)`; both run in threads, those of `limiter` where a megabyte may take a sink long. A text that was not sent is
    None.

    Raises InvalidRequestError for a malformed form, UploadStalledError, ClientDisconnect, what the callables raise.
    """
    return await receive_files(
        request,
        _OneFile(open_sink),
        lambda one, *values: store(one.sink, *values),
        max_files=1,
        texts=texts,
        limiter=limiter,
        field=field,
        writing=limiter,
    )


async def receive_files(
    request: Request,
    sink: AbstractContextManager[FilesSinkT],
    store: Callable[..., Stored],
    max_files: int,
    texts: Sequence[str] = ("name",),
    limiter: CapacityLimiter | None = None,
    field: str = "file",
    writing: CapacityLimiter | None = None,
) -> Stored:
    """Stream the files of a request into `sink`, then `store(sink, *values of texts)`; all that they do runs in
    threads. `limiter` has those for `store` if it may take long, `writing` those for the sink's `write`.

    Raises as `receive_upload` does.
    """
    async with _in_threads(sink) as opened:
        form = open_form(request.headers.get("content-type", ""), max_files, texts, field)
        await _copy(form, request.stream(), opened, writing)
        if not form.files:
            raise InvalidRequestError((field, "is missing"))
        return await to_thread.run_sync(store, opened, *(form.text(text) for text in texts), limiter=limiter)


@asynccontextmanager
async def _in_threads(sink: AbstractContextManager[FilesSinkT]) -> AsyncIterator[FilesSinkT]:
    """The sink, opened and closed in threads: to remove what was refused may take as long as the file is large."""
    opened = await run_in_threadpool(sink.__enter__)
    try:
        yield opened
    except BaseException as error:
        with CancelScope(shield=True):  # also when the client has gone away
            await run_in_threadpool(sink.__exit__, type(error), error, error.__traceback__)
        raise
    await run_in_threadpool(sink.__exit__, None, None, None)


class _OneFile(Generic[SinkT]):
    """A sink that is opened when the file's name is known."""

    def __init__(self, open_sink: Callable[[str], SinkT]) -> None:
        self._open = open_sink
        self._stack = ExitStack()
        self.sink: SinkT

    def begin(self, filename: str) -> None:
        self.sink = self._open(filename)
        self._stack.enter_context(self.sink)

    def write(self, data: bytes) -> None:
        self.sink.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


async def _copy(form: Form, portions: AsyncIterator[bytes], sink: FilesSink, limiter: CapacityLimiter | None) -> None:
    batch: list[bytes] = []
    size = 0

    async def write() -> None:
        nonlocal batch, size
        if batch:
            await to_thread.run_sync(sink.write, b"".join(batch), limiter=limiter)
            batch, size = [], 0

    while not form.complete:
        for piece in form.feed(await _next(portions, form.field)):
            if isinstance(piece, FileStart):
                await write()
                await run_in_threadpool(sink.begin, piece.filename)
            else:
                batch.append(piece)
                size += len(piece)
        if size >= BATCH_BYTES:
            await write()
    await write()


async def _next(portions: AsyncIterator[bytes], field: str = "file") -> bytes:
    """The next portion of the body. Raises InvalidRequestError at its end: the form was not closed."""
    try:
        with fail_after(STALL_SECONDS):
            return await anext(portions)
    except TimeoutError as error:
        raise UploadStalledError(STALL_SECONDS) from error
    except StopAsyncIteration as error:
        raise InvalidRequestError((field, "the multipart body ends too early")) from error
