"""What events say in words."""

from __future__ import annotations

from typing import Any, Literal

_MESSAGES = {
    "queued": "Job created and queued",
    "planned": "Planned: {num_chunks} chunks of {chunk_length} tokens, predicted peak {predicted_peak_bytes} bytes",
    "started": "Started at step {step}",
    "probed": "Peak of the first micro-batch: {peak_bytes} bytes",
    "evaluation": "Step {step}: validation loss {loss}",
    "checkpoint": "Checkpoint at step {step}",
    "succeeded": "The job has succeeded",
    "failed": "The job has failed: {error[message]}",
    "cancelled": "The job was cancelled",
    "paused": "The job is paused",
    "resumed": "The job goes on",
    "requeued": "Queued for another attempt",
    "replanned": "Planned anew: chunks of {chunk_length} tokens",
    "trainer_failed": "The trainer failed",
    "checkpoint_damaged": "A checkpoint is damaged",
}
_LEVELS: dict[str, Literal["warn", "error"]] = {
    "failed": "error",
    "trainer_failed": "warn",
    "checkpoint_damaged": "warn",
    "requeued": "warn",
}


def message_of(event_type: str, data: dict[str, Any]) -> str:
    """One line; a type without words of its own is its name."""
    name = event_type.replace("_", " ").capitalize()
    if event_type not in _MESSAGES:
        return name
    try:
        return _MESSAGES[event_type].format_map(data)
    except KeyError:  # of another version
        return name


def level_of(event_type: str) -> Literal["info", "warn", "error"]:
    return _LEVELS.get(event_type, "info")
