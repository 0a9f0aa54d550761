"""What the supervisors of a worker count, each in its own pool process.

Where the worker serves numbers (worker/exposition.py) its main process has set PROMETHEUS_MULTIPROC_DIR before these
processes began: prometheus-client then keeps every value in a file, which the main process reads, also after the
process that wrote it has ended. Elsewhere they are numbers that nobody asks for.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from service.runs import TYPICAL_STEPS
from worker.messages import Checkpoint, Message, Metric

STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PEAK_BUCKETS = (0.8, 0.9, 0.95, 0.98, 1.0, 1.02, 1.05, 1.1, 1.25)
TIME_BUCKETS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)

REGISTRY = CollectorRegistry()
ATTEMPTS = Counter(
    "slimtune_worker_attempts",
    "Attempts that ended here, by the state that their job is in then; lost: it was no longer this worker's.",
    ("end",),
    registry=REGISTRY,
)
STEP_SECONDS = Histogram(
    "slimtune_worker_step_seconds", "Time of an optimiser step.", buckets=STEP_BUCKETS, registry=REGISTRY
)
TOKENS = Counter("slimtune_worker_tokens", "Tokens trained on.", registry=REGISTRY)
CHECKPOINT_SECONDS = Histogram(
    "slimtune_worker_checkpoint_seconds", "Time to write a checkpoint.", buckets=CHECKPOINT_BUCKETS, registry=REGISTRY
)
HEARTBEAT_FAILURES = Counter(
    "slimtune_worker_heartbeat_failures",
    "Times that a supervisor could not reach the database to renew its lease and write.",
    registry=REGISTRY,
)
PEAK_OVER_PREDICTED = Histogram(
    "slimtune_worker_peak_over_predicted",
    "Measured over planned peak of an attempt that trained.",
    buckets=PEAK_BUCKETS,
    registry=REGISTRY,
)
TIME_OVER_PREDICTED = Histogram(
    "slimtune_worker_time_over_predicted",
    "Measured over planned time of a step, of an attempt that trained.",
    buckets=TIME_BUCKETS,
    registry=REGISTRY,
)


class AttemptNumbers:
    """Counts what one attempt's trainer reports."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._tokens: int | None = None
        self._peak_bytes = 0
        self._latest: deque[float] = deque(maxlen=TYPICAL_STEPS)

    def note(self, message: Message) -> None:
        if isinstance(message, Metric):
            STEP_SECONDS.observe(message.step_seconds)
            # Tokens are counted since the start of the job. The first step here has had as many as the others.
            before = message.tokens * (message.step - 1) / message.step if self._tokens is None else self._tokens
            TOKENS.inc(max(0.0, message.tokens - before))
            self._tokens = message.tokens
            self._peak_bytes = max(self._peak_bytes, message.peak_bytes)
            self._latest.append(message.step_seconds)
        elif isinstance(message, Checkpoint) and message.seconds is not None:
            CHECKPOINT_SECONDS.observe(message.seconds)

    def end(self, status: str) -> None:
        """The attempt is over, and its job has this status."""
        ATTEMPTS.labels(status).inc()
        if not self._latest:
            return
        PEAK_OVER_PREDICTED.observe(self._peak_bytes / self._plan["predicted_peak_bytes"])
        if predicted := self._plan.get("predicted_step_seconds"):
            TIME_OVER_PREDICTED.observe(statistics.median(self._latest) / predicted)
