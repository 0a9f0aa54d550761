"""What is asked of the service: the fields of POST /jobs, /plans and of samples (docs/api.md says what they mean)."""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict


class PlanRequest(TypedDict, total=False):
    """The part of a job that decides how it runs."""

    model: Required[str]
    memory_cap: Required[str | int]
    """Bytes, or a text such as `1.5GiB`."""
    sequence_length: Required[int]
    name: str | None
    validation_dataset: str | None
    validation_fraction: float | None
    steps: int | None
    epochs: int | None
    batch_size: int
    attention: Literal["softmax", "performer"] | None
    tokenizer: str | None
    packing: Literal["packed", "continuous", "single"]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    method: dict[str, Any]
    matching: dict[str, Any] | None
    precision: Literal["float32", "bfloat16"]
    dropout: float
    label_smoothing: float
    gradient_clip: float | None
    evaluate_every: int | None
    evaluate_sequences: int
    early_stopping: dict[str, Any] | None
    checkpoint_every: int | None
    keep: int
    chunking: Literal["auto"] | dict[str, Any]
    seed: int
    metadata: dict[str, str]


class PlanQuestion(PlanRequest, total=False):
    """What `plans.create` takes: data only to count epochs."""

    dataset: str | None


class JobRequest(PlanRequest, total=False):
    """What `jobs.create` takes."""

    dataset: Required[str]


class Message(TypedDict):
    """One of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class SampleOptions(TypedDict, total=False):
    """How to continue a text."""

    checkpoint: int | str
    """A step, or `latest` (default), `best`, `final`."""
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    stop: str | list[str]
    seed: int | None
