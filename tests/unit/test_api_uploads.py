"""The multipart form, fed in any portions."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
