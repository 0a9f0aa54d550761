"""Why jobs and preparations fail: every code that their `error` can have, and what to do about it
(docs/reliability.md).
"""

from __future__ import annotations

from typing import Any

_SEE_EVENT = "read the end of the trainer's log in the job's event trainer_failed"

HINTS: dict[str, str] = {
    "memory_cap_exceeded": "raise memory_cap, or train a smaller model or adapters (LoRA)",
    "diverged": "lower the learning rate, lengthen the warm-up or set gradient_clip",
    "dataset_invalid": "mend the dataset, upload it again and create the job anew",
    "document_too_large": "split the longest document of the dataset, or raise memory_cap",
    "model_invalid": "start from another model",
    "disk_full": "free space in the data directory and resume the job: it goes on from its last checkpoint",
    "storage_unavailable": "see that the object store of SLIMTUNE_STORAGE_URL answers (GET /readyz) and resume the job",
    "storage_denied": "mend the key, its permissions or the bucket's name (docs/storage.md) and resume the job",
    "trainer_error": _SEE_EVENT,
    "trainer_crashed": _SEE_EVENT,
    "protocol_error": f"{_SEE_EVENT} for what writes into its reports",
    "supervisor_error": "read the worker's log of this job and attempt",
    "worker_lost": "look whether the worker's machine stopped or ran out of memory, and read the worker's log",
    "attempts_exhausted": "see the job's events for how each attempt ended",
}
"""What a person can do, by code."""

PAUSING = frozenset({"disk_full", "storage_unavailable", "storage_denied"})
"""Nothing that the job did, and nothing that another attempt mends: it waits for a person
(docs/decisions/0010-a-full-disk-pauses.md)."""


PREPARATION_HINTS: dict[str, str] = {
    "dataset_invalid": "mend the dataset and upload it again",
    "tokenizer_invalid": "send the tokenizer.json that the tokenizers library writes (Tokenizer.save)",
    "tokenizer_too_large": "use a smaller one, or have SLIMTUNE_PREPARER_MEMORY_BYTES raised",
    "tokenizer_missing": "the tokenizer or model was deleted meanwhile: name another one",
    "model_invalid": "convert it again, or upload its safetensors and config.json",
    "model_too_large": "upload its safetensors, or have SLIMTUNE_PREPARER_MEMORY_BYTES raised",
    "document_too_large": "split the longest document, or have SLIMTUNE_PREPARER_MEMORY_BYTES raised",
    "disk_full": "free space in the data directory: it is tried again by itself",
    "storage_unavailable": "see that the object store answers (GET /readyz): it is tried again by itself",
    "storage_denied": "mend the object store's key or permissions (docs/storage.md): it is tried again by itself",
    "preparation_crashed": "read the worker's log; POST /datasets/{id}/tokenizations, or another upload, tries again",
    "preparation_timeout": "send a smaller file or a simpler template; the largest may take SLIMTUNE_PREPARER_SECONDS",
    "worker_lost": HINTS["worker_lost"],
}
"""The same for what the preparer does in the background."""


def preparation_error(code: str, message: str, **fields: Any) -> dict[str, Any]:
    """The `error` of a tokenization, tokenizer or model. Raises KeyError for a code without a hint."""
    return {"code": code, "message": message, "hint": PREPARATION_HINTS[code], **fields}


def job_error(code: str, message: str, step: int, hint: str | None = None, **fields: Any) -> dict[str, Any]:
    """A job's `error`, with the code's hint unless there is a better one. Raises KeyError for a code without a hint."""
    return {"code": code, "message": message, "step": step, "hint": hint or HINTS[code], **fields}
