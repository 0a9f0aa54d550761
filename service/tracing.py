"""Traces of requests and of the attempts that come of them, where an operator asks for them with
OTEL_EXPORTER_OTLP_ENDPOINT. Elsewhere everything here does nothing, and OpenTelemetry is not imported.

    with tracing.span("plan"):
        ...                         # lines of the log have its trace_id
    job.trace = tracing.traceparent()      # and hours later, in another process:
    with tracing.span("attempt", parent=job.trace):
        ...
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from service import logs
from service.settings import Settings

Attributes = Mapping[str, str | int | float | bool | None]
"""What is None is left out."""
Kind = Literal["internal", "server", "consumer"]

logger = logging.getLogger(__name__)


class Span(Protocol):
    """Something that takes time, while it does."""

    def set(self, attributes: Attributes) -> None: ...

    def rename(self, name: str) -> None: ...

    def fail(self, error_type: str) -> None:
        """It went wrong; `error_type` is a code or the name of a class."""


class Tracing(Protocol):
    """What makes spans (otel.py)."""

    def span(
        self, name: str, kind: Kind, parent: str | None, attributes: Attributes
    ) -> AbstractContextManager[tuple[Span, str]]:
        """The span and its trace's id. What is raised in the block is a failure of it."""

    def ended(self, name: str, began_ns: int, ended_ns: int, attributes: Attributes) -> None: ...

    def traceparent(self) -> str | None: ...

    def flush(self, seconds: float) -> bool: ...

    def close(self, seconds: float) -> None: ...


class _NoSpan:
    def set(self, attributes: Attributes) -> None:
        """Nobody asks."""

    def rename(self, name: str) -> None:
        """Nobody asks."""

    def fail(self, error_type: str) -> None:
        """Nobody asks."""


_NOTHING = _NoSpan()
_active: list[Tracing] = []


def start(settings: Settings, service: str) -> bool:
    """Make spans in this process from now on, as `service`, if the settings ask for it; whether they do and it is
    possible. Again is fine."""
    if settings.otel_endpoint is None:
        return False
    if not _active:
        try:
            from service import otel  # noqa: PLC0415  # half a second, and a package that need not be there
        except ImportError as error:
            logger.error(  # noqa: TRY400  # the trace says no more
                "no traces, though OTEL_EXPORTER_OTLP_ENDPOINT is set: install slimtune[traces] (%s)",
                error,
            )
            return False
        use(otel.to_collector(service))
        logger.info("traces go to %s", settings.otel_endpoint)
    return True


def use(tracing: Tracing) -> None:
    """Make spans with this, as tests do with one that keeps them."""
    _active[:] = [tracing]


def active() -> bool:
    return bool(_active)


def flush(seconds: float) -> None:
    """Wait until what has ended is sent, for so long at most."""
    for tracing in _active:
        tracing.flush(seconds)


def stop(seconds: float = 2.0) -> None:
    """No more spans; what has ended is sent, if that takes no longer."""
    for tracing in _active:
        tracing.close(seconds)
    _active.clear()


@contextlib.contextmanager
def span(
    name: str, *, kind: Kind = "internal", parent: str | None = None, attributes: Attributes | None = None
) -> Iterator[Span]:
    """A span around the block: below `parent` (a W3C traceparent) if that is one, else below the one around it."""
    if not _active:
        yield _NOTHING
        return
    with _active[0].span(name, kind, parent, attributes or {}) as (made, trace_id), logs.bound(trace_id=trace_id):
        yield made


def ended(name: str, began_ns: int, ended_ns: int, attributes: Attributes | None = None) -> None:
    """A span, below the one around the call, of what began and ended when nobody could tell yet what it was. Times are
    those of `time.time_ns`."""
    for tracing in _active:
        tracing.ended(name, began_ns, max(began_ns, ended_ns), attributes or {})


def traceparent() -> str | None:
    """The span around the call, as the W3C's header; None without traces, or if nothing is around."""
    return _active[0].traceparent() if _active else None
