"""A job's events in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from api.web.pages import shown_bytes, shown_number, shown_seconds
from service.models import JobEvent

Tone = Literal["plain", "good", "warn", "bad"]
Data = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """What an event says to a person."""

    title: str
    detail: str = ""
    tone: Tone = "plain"
    log: list[str] = field(default_factory=list)
    """The last lines of a program that failed."""


@dataclass(frozen=True, slots=True)
class Entry:
    id: int
    attempt: int
    type: str
    created_at: datetime
    told: Told


STOPPED_BY = {
    "cancel": "it was cancelled",
    "pause": "it was paused",
    "worker_lost": "its worker is gone",
    "worker_shutdown": "its worker shuts down",
}
GIVEN_BACK = {
    "lease_expired": "The worker is gone: it was killed, or lost its machine or its network",
    "worker_lost": "The worker is gone",
    "worker_shutdown": "The worker shut down",
    "memory_cap_exceeded": "The trainer reached its cap",
    "trainer_crashed": "The trainer crashed",
    "trainer_error": "The trainer failed",
}
"""Why an attempt ended, by the reason of `requeued`."""


def entries(events: Iterable[JobEvent]) -> list[Entry]:
    """Newest first, as the events. An evaluation whose loss the checkpoint after it has too is not told twice."""
    shown: list[Entry] = []
    checkpoint = None
    for event in events:
        step = event.data.get("step")
        if event.type == "evaluation" and checkpoint == step and step is not None:
            continue
        checkpoint = step if event.type == "checkpoint" and event.data.get("validation_loss") is not None else None
        told_as = told(event.type, event.data)
        shown.append(Entry(event.id, event.attempt, event.type, event.created_at, told_as))
    return shown


def told(event_type: str, data: Data) -> Told:
    """An event of this type in words; the type itself for one that a later version has."""
    words = _WORDS.get(event_type)
    return Told(event_type.replace("_", " ").capitalize()) if words is None else words(data)


def _step(data: Data) -> str:
    step = data.get("step")
    return "" if step is None else f"step {step:,}"


def _error(data: Data, name: str = "error") -> str:
    error = data.get(name) or {}
    return " ".join(str(error[part]) for part in ("message",) if error.get(part))


def _planned(data: Data) -> Told:
    chunks = f"{data.get('num_chunks', 1):,} chunks of {data.get('chunk_length', 0):,} tokens"
    return Told("Planned", f"{chunks}, predicted peak {shown_bytes(data.get('predicted_peak_bytes'))}")


def _started(data: Data) -> Told:
    step = data.get("step") or 0
    return Told("Taken by a worker", f"{data.get('worker', '')}" + (f", goes on after step {step:,}" if step else ""))


def _data(data: Data) -> Told:
    training = data.get("training") or {}
    parts = [f"{training.get('documents', 0):,} documents, {training.get('windows', 0):,} sequences an epoch"]
    if dropped := training.get("dropped_documents"):
        parts.append(f"{dropped:,} documents left out")
    if split := training.get("split_documents"):
        parts.append(f"{split:,} documents in several sequences")
    return Told("Data read", ", ".join(parts))


def _loss_after(data: Data, name: str) -> str:
    loss = data.get(name)
    return "" if loss is None else f"validation loss {shown_number(float(loss))}"


def _requeued(data: Data) -> Told:
    reason = str(data.get("reason", ""))
    why = GIVEN_BACK.get(reason) or f"The attempt ended ({reason})"
    detail = f"{why}. The job waits for a worker and goes on from its last checkpoint."
    return Told("Back in the queue", f"{detail} {_error(data)}".strip() if reason not in GIVEN_BACK else detail, "warn")


def _replanned(data: Data) -> Told:
    parts = []
    if cap := data.get("memory_cap"):
        parts.append(f"under a cap of {shown_bytes(cap)}")
    if chunk := data.get("chunk_length"):
        parts.append(f"chunks of {chunk:,} tokens")
    return Told("Planned anew", ", ".join(parts), "plain" if data.get("memory_cap") else "warn")


def _trainer_failed(data: Data) -> Told:
    error = data.get("error") or {}
    killed = data.get("signal")
    title = f"The trainer was killed ({killed})" if killed else "The trainer failed"
    if error.get("code") == "worker_lost":
        title = "The worker was lost"
    hint = f" To mend it: {error['hint']}." if error.get("hint") else ""
    return Told(title, f"{error.get('message', '')}{hint}", "bad", [str(line) for line in data.get("log") or []])


def _paused(data: Data) -> Told:
    if error := _error(data):
        return Told("Paused by the service", f"{error} {(data.get('error') or {}).get('hint') or ''}".strip(), "warn")
    return Told("Paused", _step(data) and f"after {_step(data)}")


def _failed(data: Data) -> Told:
    hint = (data.get("error") or {}).get("hint")
    return Told("Failed", f"{_error(data)}{f' To mend it: {hint}.' if hint else ''}", "bad")


def _checkpoint(data: Data) -> Told:
    return Told(f"Checkpoint of {_step(data)}", _loss_after(data, "validation_loss"), "good")


def _matching(data: Data) -> Told:
    left = shown_seconds(data["step_seconds"]) if data.get("step_seconds") else ""
    error = f"relative error {shown_number(data.get('relative_error'))}"
    return Told(
        f"Attention matched, {data.get('step')} of {data.get('of')}", error + (f", {left} each" if left else "")
    )


_WORDS: dict[str, Callable[[Data], Told]] = {
    "queued": lambda _: Told("Queued"),
    "planned": _planned,
    "started": _started,
    "data": _data,
    "training": lambda data: Told("Trains", f"after {_step(data)}" if data.get("step") else "from the beginning"),
    "matching": _matching,
    "probed": lambda data: Told("Tried one micro-batch", f"it held {shown_bytes(data.get('peak_bytes'))}"),
    "evaluation": lambda data: Told(f"Evaluated after {_step(data)}", _loss_after(data, "loss")),
    "checkpoint": _checkpoint,
    "checkpoint_damaged": lambda data: Told(
        f"The checkpoint of {_step(data)} is damaged", f"{data.get('reason', '')}; an earlier one is used", "bad"
    ),
    "pause_requested": lambda _: Told("Pause asked for"),
    "cancel_requested": lambda _: Told("Cancellation asked for"),
    "resume_requested": lambda _: Told("The pause was taken back"),
    "stopping": lambda data: Told(
        "Stopping", f"{STOPPED_BY.get(str(data.get('reason')), str(data.get('reason')))}; a checkpoint is written first"
    ),
    "resumed": lambda _: Told("Resumed", "it waits for a worker"),
    "requeued": _requeued,
    "replanned": _replanned,
    "trainer_failed": _trainer_failed,
    "paused": _paused,
    "succeeded": lambda data: Told("Succeeded", _step(data) and f"after {_step(data)}", "good"),
    "failed": _failed,
    "cancelled": lambda data: Told("Cancelled", _step(data) and f"after {_step(data)}"),
}
TYPES = tuple(_WORDS)
"""For which a page listens."""
