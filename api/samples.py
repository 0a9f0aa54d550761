"""Samples over HTTP: whole, or as server-sent events while they are made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from api import sse
from api.errors import service_problem
from api.generation import GenerateResponse
from api.sampler import GRACE_SECONDS, Sampler, Slots
from service.errors import ServiceError
from service.settings import Settings


class Sample(Response):
    """The answer that a process makes. It is started when this is sent, and killed when the client goes away."""

    def __init__(
        self,
        settings: Settings,
        slots: Slots,
        hold: Callable[[ExitStack], Path],
        request: dict[str, Any],
        *,
        step: int,
        seed: int,
        stream: bool,
    ) -> None:
        """`hold` brings the checkpoint's folder, in a thread, to where it stays until what it is given is closed."""
        super().__init__()
        self._hold = hold
        self._settings = settings
        self._slots = slots
        self._request = {**request, "seed": seed}
        self._facts = {"step": step, "seed": seed}
        self._stream = stream
        self._complete = False
        """Whether the process is gone, and only the end of the answer is to be sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ServiceError before anything is sent, ClientDisconnect when the client went away or reads nothing."""
        with self._slots.one(), ExitStack() as held:
            folder = await to_thread.run_sync(self._hold, held, limiter=CapacityLimiter(1))
            self._request["folder"] = str(folder)
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_events(scope, send) if self._stream else self._send(scope, receive, send))
        gone = asyncio.create_task(sse.disconnected(receive))
        try:
            limit = self._settings.generate_seconds + 2 * GRACE_SECONDS
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not self._complete:
                raise ClientDisconnect
            await work
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)  # then the process has ended

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with Sampler(self._settings) as sampler:
            await sampler.begin(self._request)
            text = "".join([piece async for piece in sampler.pieces()])
            body = self._summary(sampler, text)
        self._complete = True
        await JSONResponse(body)(scope, receive, send)

    async def _send_events(self, scope: Scope, send: Send) -> None:
        async with Sampler(self._settings) as sampler:
            await sampler.begin(self._request)  # what goes wrong before this is done has its own status
            await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
            try:
                async for piece in sampler.pieces():
                    event = sse.event("token", {"text": piece})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                body = self._summary(sampler, "")
                del body["text"]
                last = sse.event("done", body)
            except ServiceError as error:
                last = sse.event("error", json.loads(bytes(service_problem(scope, error).body)))
        self._complete = True
        await send({"type": "http.response.body", "body": last})

    def _summary(self, sampler: Sampler, text: str) -> dict[str, Any]:
        return GenerateResponse.model_validate(
            {
                "text": text,
                "finish_reason": sampler.finish_reason,
                "tokens": sampler.tokens,
                "prompt_tokens": sampler.prompt_tokens,
                "seconds": round(sampler.seconds, 3),
                **self._facts,
            }
        ).model_dump()
