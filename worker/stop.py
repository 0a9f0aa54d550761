"""When a supervisor has to stop: SIGTERM, or a parent that is gone."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Self


class StopRequest(AbstractContextManager["StopRequest"]):
    """Inside the block SIGTERM asks for an orderly end instead of being one.

    Celery's pool processes die of SIGTERM when idle, which is right; while one of them runs a job, the worker's warm
    shutdown passes the signal on to it (worker/app.py), and so does a service manager that signals a whole group.
    """

    def __init__(self) -> None:
        self.requested = False
        self._parent = os.getppid()
        self._previous: object = None

    @property
    def orphaned(self) -> bool:
        """Whether the process that started this one is gone. Celery's pool asks the kernel for SIGKILL then, where
        the C library is the one that it knows; this is for where it is not.
        """
        return os.getppid() != self._parent

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]  # what signal() itself gave
