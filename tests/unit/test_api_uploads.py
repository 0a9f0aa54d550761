"""The multipart form, fed in any portions."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from api import uploads
from api.errors import InvalidRequestError, UploadStalledError
from api.uploads import FileStart, Form, open_form

TYPE = "multipart/form-data; boundary=edge"


def test_an_upload_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "STALL_SECONDS", 0.05)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"first"
        await anyio.sleep(30)
        yield b"never"

    async def read_two() -> None:
        portions = trickle()
        assert await uploads._next(portions) == b"first"
        await uploads._next(portions)

    with pytest.raises(UploadStalledError):
        anyio.run(read_two)


class Closing:
    """A sink that says in which thread it is closed, and what it was told."""

    thread: int
    told: type[BaseException] | None

    def begin(self, filename: str) -> None: ...

    def write(self, data: bytes) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thread, self.told = threading.get_ident(), kind


@pytest.mark.parametrize("cancelled", [True, False])
def test_what_is_refused_or_given_up_is_removed_in_a_thread(cancelled: bool) -> None:
    sink = Closing()

    async def receive() -> None:
        with anyio.CancelScope() as scope:
            async with uploads._in_threads(sink):
                if not cancelled:
                    raise UploadStalledError(1.0)
                scope.cancel()
                await anyio.sleep(30)

    if cancelled:
        anyio.run(receive)
    else:
        with pytest.raises(UploadStalledError):
            anyio.run(receive)
    assert sink.told is not None
    assert (sink.told is UploadStalledError) is not cancelled
    assert sink.thread != threading.get_ident()


def test_checks_wait_for_each_other() -> None:
    """Three uploads of which one may be stored at a time: each has that one thread, and all are stored in the end."""
    limiter = anyio.CapacityLimiter(1)
    at_once: list[int] = []

    def store(_sink: Closing, _name: str | None) -> str:
        at_once.append(limiter.borrowed_tokens)
        return "stored"

    async def receive() -> None:
        content = body(part("file", b"text", "a.txt"))
        scope = {"type": "http", "headers": [(b"content-type", TYPE.encode())]}

        async def message() -> Message:
            return {"type": "http.request", "body": content, "more_body": False}

        assert await uploads.receive_files(Request(scope, message), Closing(), store, 1, limiter=limiter) == "stored"

    async def all_of_them() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(receive)

    anyio.run(all_of_them)
    assert at_once == [1, 1, 1]


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file_name = "" if filename is None else f'; filename="{filename}"'
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--edge--\r\n"


def feed(form: Form, data: bytes, size: int) -> list[tuple[str, bytes]]:
    """The files, in the order in which they began."""
    files: list[tuple[str, bytes]] = []
    for at in range(0, len(data), size):
        for piece in form.feed(data[at : at + size]):
            if isinstance(piece, FileStart):
                files.append((piece.filename, b""))
            else:
                files[-1] = (files[-1][0], files[-1][1] + piece)
    return files


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3), st.integers(1, 50), st.integers(0, 3))
def test_the_bytes_come_out_however_they_arrive(contents: list[bytes], size: int, name_at: int) -> None:
    files = [(f"{number}.txt", content.replace(b"edge", b"")) for number, content in enumerate(contents)]
    parts = [part("file", content, filename) for filename, content in files]
    parts.insert(name_at, part("name", "caf\u00e9".encode()))
    form = open_form(TYPE, max_files=3)
    assert feed(form, body(*parts), size) == files
    assert (form.files, form.name, form.complete) == (len(files), "caf\u00e9", True)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (part("file", b"x", "a.txt") + part("file", b"y", "b.txt"), "file"),
        (part("file", b"x"), "file"),
        (part("name", b"x" * 2_000), "name"),
        (part("other", b"x"), "other"),
        (part("", b"x"), ""),
        (b"no multipart at all", "file"),
        (b"--edge\r\nbroken header\r\n\r\n", "file"),
        (part("file", b"x", "n" * 10_000 + ".txt"), "file"),
        (b"--edge\r\n" + b"X-Header: y\r\n" * 100 + b"\r\n", "file"),
    ],
)
def test_a_form_of_another_shape_is_refused(data: bytes, field: str) -> None:
    form = open_form(TYPE)
    with pytest.raises(InvalidRequestError) as caught:
        feed(form, data, 1_000)
    assert caught.value.fields["errors"][0]["field"] == field


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=" + "x" * 300,
    ],
)
def test_another_content_type_is_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequestError):
        open_form(content_type)
