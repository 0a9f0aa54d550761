"""Traces by OpenTelemetry's SDK (service/tracing.py). Imported only where there are to be some; everything about where
and how they are sent is in the SDK's own variables, OTEL_*.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.tracing import Attributes, Kind, Span

SEND_SECONDS = 5.0
BATCH = 256
MAX_WAITING = 4_096
"""Ended spans that are not sent yet; what comes then is dropped."""

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER}
_PROPAGATOR = TraceContextTextMapPropagator()

logger = logging.getLogger(__name__)


def to_collector(service: str) -> OpenTelemetry:
    """Spans that go to the collector of OTEL_EXPORTER_OTLP_ENDPOINT, as protobuf over HTTP."""
    return OpenTelemetry(service, Sender(OTLPSpanExporter()))


class OpenTelemetry:
    """A tracer of its own, and not the process's global one, which belongs to whoever embeds this."""

    def __init__(self, service: str, processor: SpanProcessor) -> None:
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME goes before
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        self._processor = processor
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("slimtune")

    @contextmanager
    def span(self, name: str, kind: Kind, parent: str | None, attributes: Attributes) -> Iterator[tuple[Span, str]]:
        context = None if parent is None else _PROPAGATOR.extract({"traceparent": parent}, Context())
        with self._tracer.start_as_current_span(
            name,
            context,
            _KINDS[kind],
            _known(attributes),
            record_exception=False,  # the text of an exception may have what is for no other system
            set_status_on_exception=False,
        ) as made:
            handle = _Handle(made)
            try:
                yield handle, trace.format_trace_id(made.get_span_context().trace_id)
            except BaseException as error:
                handle.fail(type(error).__name__)
                raise

    def ended(self, name: str, began_ns: int, ended_ns: int, attributes: Attributes) -> None:
        self._tracer.start_span(name, attributes=_known(attributes), start_time=began_ns).end(ended_ns)

    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent")

    def flush(self, seconds: float) -> bool:
        return self._processor.force_flush(int(1_000 * seconds))

    def close(self, seconds: float) -> None:
        self.flush(seconds)
        self._provider.shutdown()


class _Handle:
    def __init__(self, made: trace.Span) -> None:
        self._made = made

    def set(self, attributes: Attributes) -> None:
        self._made.set_attributes(_known(attributes))

    def rename(self, name: str) -> None:
        self._made.update_name(name)

    def fail(self, error_type: str) -> None:
        self._made.set_attribute("error.type", error_type)
        self._made.set_status(StatusCode.ERROR)


def _known(attributes: Attributes) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in attributes.items() if value is not None}


class Sender(SpanProcessor):
    """Sends ended spans from a thread of its own, a batch at a time.

    In place of the SDK's BatchSpanProcessor, whose `force_flush` waits for as long as the exporter tries, and which
    starts a thread in each forked child, so also in a trainer's process before it becomes one. Whoever ends a span
    never waits: while the collector is away they pile up to a limit, and are dropped beyond.
    """

    def __init__(self, exporter: SpanExporter, every_seconds: float = SEND_SECONDS) -> None:
        self._exporter = exporter
        self._every_seconds = every_seconds
        self._waiting: deque[ReadableSpan] = deque()
        self._dropped = 0
        self._sending = self._hurry = self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        if not span.context.trace_flags.sampled:
            return
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._stopping:
                self._dropped += 1
                return
            self._waiting.append(span)
            if len(self._waiting) >= BATCH:
                self._changed.notify_all()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._sending, timeout_millis / 1_000)

    def shutdown(self) -> None:
        """At once: what is not sent by now is lost."""
        with self._changed:
            self._stopping = True
            self._waiting.clear()
            self._changed.notify_all()
        self._exporter.shutdown()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                try:
                    self._exporter.export(batch)  # which says itself in the log what went wrong
                except Exception:
                    logger.exception("%d spans are lost", len(batch))

    def _next(self) -> list[ReadableSpan] | None:
        """What to send, after a while; None at the end."""
        with self._changed:
            self._sending = False
            if not self._waiting:
                self._hurry = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._stopping or self._hurry or len(self._waiting) >= BATCH, self._every_seconds
            )
            if self._stopping:
                return None
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._sending = bool(batch)
            dropped, self._dropped = self._dropped, 0
        if dropped:
            logger.warning("%d spans dropped: the collector does not take them fast enough", dropped)
        return batch
