"""Files over HTTP: ranges and conditions by Starlette, with our validators and our errors."""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from api.problems import problem_response
from service.errors import CheckpointDamagedError, NotFoundError
from service.storage import Storage

PART_BYTES = 1 << 20
"""Of a file, read at once: what a download holds is two of them, or three."""
_CANNOT_TELL = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS)
"""It is not in memory, or this file system does not say."""


class Download(FileResponse):
    """A file whose SHA-256 is known: the strong ETag, and the Repr-Digest (RFC 9530) also of a part."""

    chunk_size = PART_BYTES

    def __init__(self, files: Storage, path: str, name: str, size: int, sha256: str) -> None:
        """`path` is relative, as service.storage has it. Raises NotFoundError if the file is gone,
        CheckpointDamagedError if it has another size, StorageUnavailableError."""
        self._stream = files.stream(path)
        try:
            status = files.stat(path)
        except FileNotFoundError as error:
            raise NotFoundError("file", name) from error
        if status.st_size != size:
            raise CheckpointDamagedError(name)
        digest = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {
            "ETag": f'"{sha256}"',
            "Repr-Digest": f"sha-256=:{digest}:",
            "Cache-Control": "private, max-age=0, must-revalidate",
        }
        super().__init__(
            files.path(path), 200, headers, "application/octet-stream", filename=Path(name).name, stat_result=status
        )

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[Any]:
        """In place of Starlette's, which sends each read through a thread."""
        if self._stream is not None:
            async with aclosing(_Streamed(self._stream)) as streamed:
                yield streamed
            return
        with await to_thread.run_sync(FileIO, self.path) as file:
            yield _Parts(file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_known(Headers(scope=scope).get("if-none-match", "")):
            await Response(status_code=304, headers={"ETag": self.headers["etag"]})(scope, receive, send)
            return
        refused = 0

        async def send_checked(message: Message) -> None:
            # Starlette answers a bad Range in plain text.
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in {400, 416}:
                refused = message["status"]
            elif not refused:
                await send(message)

        await super().__call__(scope, receive, send_checked)
        if refused == 400:
            await problem_response(scope, 400, "range_malformed", "The Range header cannot be read.")(
                scope, receive, send
            )
        elif refused == 416:
            size = self.headers["content-length"]
            detail = f"The range lies outside the file of {size} bytes."
            headers = {"Content-Range": f"bytes */{size}"}
            await problem_response(scope, 416, "range_not_satisfiable", detail, headers=headers)(scope, receive, send)

    def _is_known(self, if_none_match: str) -> bool:
        """Whether the client has this very file: weak comparison, as RFC 9110 wants for If-None-Match."""
        tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        return "*" in tags or self.headers["etag"] in tags


class _Streamed:
    """A file that an object store sends, from where it is read first. Holds what is left of a block, and the next."""

    def __init__(self, stream: Callable[[int], AsyncIterator[bytes]]) -> None:
        self._open = stream
        self._at = 0
        self._blocks: AsyncIterator[bytes] | None = None
        self._rest = memoryview(b"")

    async def seek(self, position: int) -> None:
        if position != self._at:
            await self.aclose()
        self._at = position

    async def read(self, size: int) -> bytearray:
        """As many bytes as there are up to `size`. Raises StorageUnavailableError."""
        if self._blocks is None:
            self._blocks = self._open(self._at)
        buffer = bytearray()
        while len(buffer) < size:
            if not self._rest:
                block = await anext(self._blocks, None)
                if block is None:
                    break
                self._rest = memoryview(block)
            taken = self._rest[: size - len(buffer)]
            buffer += taken
            self._rest = self._rest[len(taken) :]
        self._at += len(buffer)
        return buffer

    async def aclose(self) -> None:
        """The store need send no more."""
        blocks, self._blocks, self._rest = self._blocks, None, memoryview(b"")
        if isinstance(blocks, AsyncGenerator):
            await blocks.aclose()


class _Parts:
    """A file, read on the event loop where that takes no waiting: what is in the page cache is only copied. For what a
    disk must bring there is a thread."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._at = 0

    async def seek(self, position: int) -> None:
        self._at = position

    async def read(self, size: int) -> bytearray | memoryview:
        """As many bytes as there are up to `size`, as a regular file gives them."""
        buffer = bytearray(size)
        done = self._cached(buffer)
        view = memoryview(buffer)
        while done < size:
            read = await to_thread.run_sync(os.preadv, self._file.fileno(), [view[done:]], self._at + done)
            if not read:
                break
            done += read
        self._at += done
        return buffer if done == size else view[:done]

    def _cached(self, buffer: bytearray) -> int:
        """Fill the buffer from its start with what is there without a wait; returns how many bytes that were."""
        try:
            return os.preadv(self._file.fileno(), [buffer], self._at, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in _CANNOT_TELL:
                raise
            return 0
