"""Memory as lengths: where the marks of a gauge are, in percent of its width.

A page may have no style of its own, so lengths are attributes of SVG.
"""

from __future__ import annotations

from dataclasses import dataclass

from api.responses import BreakdownResponse, JobSummary

FAR = 2.2
"""The unchunked step is drawn to scale up to this many times what else there is, ..."""
CAP_AT = 62.0
"""... else the cap is here, ..."""
BREAK_AT = 84.0
"""... the scale ends here, and what is right of it is larger than it looks."""
FAR_AT = 94.0
SMALL_CAP_AT = 88.0
"""Where the cap is on a scale that leaves the unchunked step out."""

CAUSES = {
    "runtime": "Python, torch and the device's own context",
    "parameters": "the model's weights",
    "gradients": "one for each weight that is trained",
    "optimizer": "what it remembers of each weight",
    "states": "of the attention, between chunks",
    "activations": "kept from a chunk's forward pass for its backward pass",
    "logits": "scores of the vocabulary for a block of tokens",
    "workspace": "for the largest operation",
    "learned": "what earlier jobs of this model held beyond their plans",
    "safety": "a margin",
}
"""What a plan's breakdown names."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """A job's memory on one scale. Positions are percent; None where there is no such number."""

    cap: float
    predicted: float
    measured: float | None
    unchunked: float
    broken: bool
    """Whether the scale has a gap before the unchunked peak."""
    over: bool
    """Whether more was measured than the cap allows."""
    text: str
    """The same in words, for who cannot see it."""


@dataclass(frozen=True, slots=True)
class Cause:
    name: str
    meaning: str
    bytes: int
    width: float
    """Percent of the largest one."""
    share: float
    """Percent of the whole."""


def of_job(job: JobSummary) -> Gauge:
    cap, predicted, measured = job.memory_cap, job.predicted_peak_bytes, job.measured_peak_bytes
    unchunked = job.plan.unchunked_peak_bytes
    largest = max(cap, predicted, measured or 0)
    broken = unchunked > largest * FAR
    end = largest * 100 / CAP_AT if broken else max(largest, unchunked) / 0.96

    def at(count: int) -> float:
        return round(count / end * 100, 2)

    return Gauge(
        cap=at(cap),
        predicted=at(predicted),
        measured=None if measured is None else at(measured),
        unchunked=FAR_AT if broken else at(unchunked),
        broken=broken,
        over=measured is not None and measured > cap,
        text=_in_words(job),
    )


def small(job: JobSummary) -> Gauge:
    """Without the unchunked step, for lists: the cap is at one place in all of them."""
    cap, predicted, measured = job.memory_cap, job.predicted_peak_bytes, job.measured_peak_bytes

    def at(count: int) -> float:
        return min(round(count / cap * SMALL_CAP_AT, 2), 100.0)

    return Gauge(
        cap=SMALL_CAP_AT,
        predicted=at(predicted),
        measured=None if measured is None else at(measured),
        unchunked=100.0,
        broken=True,
        over=measured is not None and measured > cap,
        text=_in_words(job),
    )


def breakdown(causes: BreakdownResponse) -> list[Cause]:
    """The causes of the predicted peak, the largest first; what is nothing is left out."""
    found = {name: getattr(causes, name) for name in CAUSES if getattr(causes, name)}
    largest, total = max(found.values(), default=1), sum(found.values()) or 1
    return [
        Cause(name, CAUSES[name], count, round(count / largest * 100, 2), count / total * 100)
        for name, count in sorted(found.items(), key=lambda item: -item[1])
    ]


def _in_words(job: JobSummary) -> str:
    def share(count: int) -> str:
        return f"{count / job.memory_cap:.0%} of the cap"

    measured = job.measured_peak_bytes
    parts = [
        "nothing measured yet" if measured is None else f"measured peak {share(measured)}",
        f"predicted peak {share(job.predicted_peak_bytes)}",
        f"the unchunked step {share(job.plan.unchunked_peak_bytes)}",
    ]
    return ", ".join(parts)
