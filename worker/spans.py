"""The trace of an attempt: its phases, as the trainer's reports tell them to the supervisor. The trainer itself knows
of no trace, and has no network."""

from __future__ import annotations

import time

from service import tracing
from service.runs import ClaimedJob
from worker.messages import (
    Checkpoint,
    Device,
    Done,
    Evaluation,
    Failure,
    GradientCheck,
    Matching,
    Message,
    Metric,
    Probed,
    Started,
)

GROUP_SECONDS = 60.0
GROUP_STEPS = 1_000
"""Steps in one span, at most: a job of a week has 10,000 spans then, and none of a millisecond."""


def of_job(job: ClaimedJob) -> tracing.Attributes:
    """What the span of an attempt says of its job."""
    return {
        "slimtune.job.id": job.id,
        "slimtune.job.attempt": job.attempt,
        "slimtune.job.memory_cap_bytes": job.memory_cap_bytes,
        "slimtune.plan.chunk_length": job.plan.get("chunk_length"),
        "slimtune.plan.predicted_peak_bytes": job.plan.get("predicted_peak_bytes"),
        "slimtune.plan.predicted_step_seconds": job.plan.get("predicted_step_seconds"),
    }


class AttemptSpans:
    """Makes spans below the one around it, `span`, that of the attempt. Where there are no traces it does nothing."""

    def __init__(self, span: tracing.Span) -> None:
        self._span = span
        self._on = tracing.active()
        self._at_ns = time.time_ns()
        """Until when all time is accounted for."""
        self._first: Metric | Matching | None = None
        """Of the steps that have no span yet, ..."""
        self._last: Metric | Matching | None = None
        self._last_ns = 0

    def note(self, message: Message) -> None:
        if not self._on:
            return
        now_ns = time.time_ns()
        match message:
            case Metric() | Matching():
                self._step(message, now_ns)
                return
            case Device():
                self._phase("start trainer", now_ns)
            case Started(step):
                self._phase("load", now_ns, {"slimtune.step": step})
            case Probed(peak_bytes):
                self._phase("probe", now_ns, {"slimtune.peak_bytes": peak_bytes})
            case Evaluation(step, loss, seconds):
                self._close_group()
                self._took("evaluate", seconds, now_ns, {"slimtune.step": step, "slimtune.validation_loss": loss})
            case Checkpoint(step=step, files=files, seconds=seconds):
                self._close_group()
                size = sum(file["bytes"] for file in files)
                self._took("checkpoint", seconds, now_ns, {"slimtune.step": step, "slimtune.bytes": size})
            case GradientCheck(relative_error=error):
                self._phase("check gradient", now_ns, {"slimtune.relative_error": error})
            case Done():
                self._close_group()
                self._at_ns = now_ns
            case Failure(code):
                self._close_group()
                self._span.fail(code)

    def end(self, status: str) -> None:
        """The attempt is over, and its job has this status; `lost` if it is no longer this worker's."""
        self._close_group()
        self._span.set({"slimtune.job.status": status})
        if status in ("failed", "lost"):
            self._span.fail(status)

    def _step(self, message: Metric | Matching, now_ns: int) -> None:
        if self._last is not None and type(self._last) is not type(message):
            self._close_group()
        if self._first is None:
            self._first = message
        self._last, self._last_ns = message, now_ns
        count = message.step - self._first.step + 1
        if count >= GROUP_STEPS or now_ns - self._at_ns >= GROUP_SECONDS * 1e9:
            self._close_group()

    def _close_group(self) -> None:
        if self._first is None or self._last is None:
            return
        last = self._last
        attributes: dict[str, str | int | float | bool | None] = {
            "slimtune.step.first": self._first.step,
            "slimtune.step.last": last.step,
            "slimtune.peak_bytes": last.peak_bytes,
        }
        if isinstance(last, Metric):
            attributes |= {"slimtune.loss": last.loss, "slimtune.tokens": last.tokens}
        self._phase("train" if isinstance(last, Metric) else "match", self._last_ns, attributes)
        self._first = self._last = None

    def _took(self, name: str, seconds: float | None, now_ns: int, attributes: tracing.Attributes) -> None:
        """A phase that the trainer has timed itself."""
        if seconds is not None:
            self._at_ns = max(self._at_ns, now_ns - int(seconds * 1e9))
        self._phase(name, now_ns, attributes)

    def _phase(self, name: str, now_ns: int, attributes: tracing.Attributes | None = None) -> None:
        tracing.ended(name, self._at_ns, now_ns, attributes)
        self._at_ns = now_ns
