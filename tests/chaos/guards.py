"""The guards of the service, each with a way to take it out: an oracle that stays green without its guard is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy import true

from service.models import Job

VARIABLE = "SLIMTUNE_TEST_WITHOUT"
"""Names the guard that processes of the tests start without (`remove_as_told`)."""


def _fence() -> Any:
    """Writes hold whatever the attempt and the state of the job."""
    return patch("service.runs._fence", lambda job_id, _attempt: (Job.id == job_id, true()))


REMOVE: dict[str, Callable[[], Any]] = {"fence": _fence}


@contextmanager
def without(guard: str | None) -> Iterator[None]:
    """Within the block this process has no such guard."""
    if guard is None:
        yield
        return
    with REMOVE[guard]():
        yield


def remove_as_told() -> None:
    """Take out the guard that the environment names, for as long as this process lives."""
    if (guard := os.environ.get(VARIABLE)) is not None:
        REMOVE[guard]().start()
