"""What the service answers, as far as the client reads it."""

from __future__ import annotations

from typing import Any, TypedDict


class FrontierPoint(TypedDict):
    chunk_length: int
    state_policy: str
    micro_batch_size: int
    predicted_peak_bytes: int
    predicted_step_seconds: float


class Plan(TypedDict):
    chunk_length: int
    num_chunks: int
    state_policy: str
    micro_batch_size: int
    accumulation_steps: int
    predicted_peak_bytes: int
    breakdown: dict[str, int]
    predicted_step_seconds: float
    predicted_total_seconds: float
    unchunked_peak_bytes: int
    minimum_cap_bytes: int
    reason: str
    calibration_source: str
    frontier: list[FrontierPoint]


class Model(TypedDict):
    id: str
    name: str
    kind: str
    status: str
    error: dict[str, Any] | None
    num_parameters: int | None
    layout: str | None


class Tokenization(TypedDict):
    tokenizer: str
    status: str
    tokens: int | None
    targets: int | None
    longest_document_tokens: int | None
    histogram: dict[str, int] | None
    problems: list[dict[str, Any]]
    error: dict[str, Any] | None


class Dataset(TypedDict):
    id: str
    filename: str
    sha256: str
    bytes: int
    documents: int | None
    tokens: int | None
    tokenizations: list[Tokenization]


class Tokenizer(TypedDict):
    id: str
    name: str
    source: str
    status: str
    vocab_size: int | None
    error: dict[str, Any] | None


class Progress(TypedDict):
    step: int
    total_steps: int
    tokens: int
    loss: float | None
    step_seconds: float | None
    eta_seconds: float | None


class JobFailure(TypedDict):
    code: str
    message: str
    step: int | None
    hint: str | None


class GradientCheck(TypedDict):
    chunk_length: int
    compared_with: int
    relative_error: float


class Certificate(TypedDict):
    gradient_check: GradientCheck | None


class JobData(TypedDict):
    id: str
    name: str | None
    status: str
    desired: str
    attempt: int
    plan: Plan
    memory_cap: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None
    certificate: Certificate | None
    progress: Progress
    output_model: str | None
    error: JobFailure | None


class Metric(TypedDict):
    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    step_seconds: float | None
    tokens: int | None
    peak_bytes: int | None
    validation_loss: float | None


class Event(TypedDict):
    id: int
    attempt: int
    type: str
    created_at: str
    data: dict[str, Any]


class FileRecord(TypedDict):
    name: str
    bytes: int
    sha256: str


class Checkpoint(TypedDict):
    step: int
    is_best: bool
    files: list[FileRecord]


class Sample(TypedDict):
    text: str
    finish_reason: str
    tokens: int
    prompt_tokens: int
    seconds: float
    step: int
    seed: int


class Device(TypedDict):
    id: str
    memory_bytes: int
    bytes_in_use: int
    jobs_running: int
    live: bool
