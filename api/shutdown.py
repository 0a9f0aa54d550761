"""The end of the process, before the server waits for open answers."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def before_the_server_stops(act: Callable[[], None]) -> None:
    """Have `act` called on this event loop when the process is told to stop, beside what its server does then.

    The lifespan hears of the end only after all answers, and streams have no end of their own.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # signals are another's
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        server = signal.getsignal(number)

        def stopping(number: int, frame: FrameType | None, server: Any = server) -> None:
            loop.call_soon_threadsafe(act)
            server(number, frame)

        if callable(server):
            signal.signal(number, stopping)
