"""The handle on a process that makes one sample (slim_core.sampler): its start, what it says, its end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from service.child_environment import inherited_environment
from service.errors import (
    ChatTemplateRefusedError,
    CheckpointDamagedError,
    GenerateBusyError,
    GenerateFailedError,
    GenerateMemoryError,
    GenerateTimeoutError,
    NotFoundError,
    PromptTooLongError,
    ServiceError,
)
from service.settings import Settings

COMMAND = (sys.executable, "-m", "slim_core.sampler")
GRACE_SECONDS = 5.0
"""For a process that looks at the clock between two tokens."""
_BUFFER_BYTES = 1 << 22
"""More than a whole sample writes: a client that reads slowly stops no process."""


def is_available() -> bool:
    """Whether torch is installed; it is not loaded."""
    return importlib.util.find_spec("torch") is not None


class Slots:
    """How many of these processes one API may have."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Raises GenerateBusyError."""
        if self._taken == self._count:
            raise GenerateBusyError(self._count)
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Sampler:
    """One process. An asynchronous context manager: when it is left, the process is gone."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._began = 0.0
        self.prompt_tokens = 0
        self.tokens = 0
        self.finish_reason = ""
        """Known after the last piece, as is `seconds`."""

    async def __aenter__(self) -> Self:
        self._began = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            limit=_BUFFER_BYTES,
            env=_environment(self._settings),
            start_new_session=True,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    @property
    def seconds(self) -> float:
        """Since the start of the process."""
        return time.monotonic() - self._began

    async def begin(self, request: dict[str, Any]) -> None:
        """Returns when the model is loaded. `request` is what slim_core.sampler reads, without the limits.

        Raises ServiceError, which says what is wrong with the request, the checkpoint or the process.
        """
        limits = {"memory_bytes": self._settings.generate_memory_bytes, "seconds": self._settings.generate_seconds}
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101  # asked for above
        # Left open: its end would mean to the process that nobody is here.
        stdin.write(json.dumps({**request, **limits}).encode() + b"\n")
        try:
            self.prompt_tokens = (await self._message())["prompt_tokens"]
        except TimeoutError:
            raise GenerateTimeoutError(self._settings.generate_seconds) from None

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Raises ServiceError."""
        while True:
            try:
                message = await self._message()
            except TimeoutError:
                self.finish_reason = "time"
                return
            self.tokens = message["tokens"]
            if message["type"] == "done":
                self.finish_reason = message["finish_reason"]
                return
            yield message["text"]

    async def _message(self) -> dict[str, Any]:
        """Raises ServiceError for one that is an error, TimeoutError when the time was over long ago."""
        stdout = self._process.stdout
        assert stdout is not None  # noqa: S101  # asked for above
        async with asyncio.timeout(self._settings.generate_seconds + GRACE_SECONDS - self.seconds):
            line = await stdout.readline()
        if not line.endswith(b"\n"):
            raise GenerateFailedError(f"The process that samples ended with status {await _status(self._process)}.")
        message: dict[str, Any] = json.loads(line)
        if message["type"] == "error":
            raise _refusal(**message)
        return message


def _refusal(type: str, code: str, message: str, **fields: Any) -> ServiceError:  # noqa: A002, ARG001  # as the wire has it
    match code:
        case "gone":
            return NotFoundError("checkpoint", fields["name"])
        case "damaged":
            return CheckpointDamagedError(message)
        case "memory":
            return GenerateMemoryError(message, **fields)
        case "prompt_too_long":
            return PromptTooLongError(message, **fields)
        case "chat_template":
            return ChatTemplateRefusedError(message)
        case _:
            return GenerateFailedError(message)


async def _status(process: Process) -> int:
    """Of one that has closed its output; negative for a signal."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_SECONDS):
            return await process.wait()
    process.kill()
    return await process.wait()


def _environment(settings: Settings) -> dict[str, str]:
    """No secrets, and no GPU, which is for jobs."""
    threads = str(settings.generate_threads)
    return {
        **inherited_environment(os.environ),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MALLOC_ARENA_MAX": "1",
    }
