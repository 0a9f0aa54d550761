"""From a fine-tuning job as OpenAI's clients ask for it to one of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from sqlalchemy.orm import Session

from api import training_data, workload
from api.errors import InvalidRequestError
from api.openai.requests import CreateJobRequest, Hyperparameters, SupervisedFields
from api.schemas import FullFields, JobRequest, TrainingOptions
from api.training_data import Counts
from service import datasets
from service.errors import ServiceError
from service.tokenizers import TokenizerRef
from slim_core.config import ModelConfig

MIN_LENGTH, MAX_LENGTH = 64, 8_192
"""Of a sequence, where the request names no length."""
MAX_LEARNING_RATE = 10.0
NAMES = {
    "dataset": "training_file",
    "validation_dataset": "validation_file",
    "epochs": "hyperparameters.n_epochs",
    "batch_size": "hyperparameters.batch_size",
    "name": "suffix",
}
"""What our fields are called in OpenAI's requests."""


@contextmanager
def in_openai_names() -> Iterator[None]:
    """An error within names the field as the request did."""
    try:
        yield
    except ServiceError as error:
        param = getattr(error, "param", error.fields.get("field"))
        if param in NAMES:
            error.param = NAMES[param]  # type: ignore[attr-defined]  # what service_problem reads
        raise


def to_job(session: Session, request: CreateJobRequest) -> JobRequest:
    """The same job in our own shape.

    Raises InvalidRequestError for what contradicts itself, DatasetNotTokenizedError and DatasetUnusableError where the
    sequence length depends on tokens that are not counted, what workload.model_of raises.
    """
    hyperparameters = _hyperparameters(request)
    epochs = _chosen(hyperparameters.n_epochs)
    if epochs is not None and request.steps is not None:
        raise InvalidRequestError(("steps", "is in place of hyperparameters.n_epochs: give one of both"))
    if epochs is None and request.steps is None:
        epochs = 1
    assert request.memory_cap is not None  # noqa: S101  # by its validator
    options = {name: getattr(request, name) for name in TrainingOptions.model_fields}
    options["optimizer"] = request.optimizer.model_copy(update={"learning_rate": _learning_rate(request)})
    return JobRequest(
        **options,
        name=request.suffix,
        model=request.model,
        dataset=request.training_file,
        validation_dataset=request.validation_file,
        memory_cap=request.memory_cap,
        sequence_length=request.sequence_length or _default_length(session, request),
        batch_size=_chosen(hyperparameters.batch_size) or 1,
        steps=request.steps,
        epochs=epochs,
        method=FullFields() if isinstance(request.method, SupervisedFields) else request.method,
        seed=request.seed or 0,
        metadata=request.metadata or {},
    )


def _chosen(value: Literal["auto"] | int | None) -> int | None:
    return None if isinstance(value, str) else value


def _hyperparameters(request: CreateJobRequest) -> Hyperparameters:
    within = request.method.supervised if isinstance(request.method, SupervisedFields) else None
    if within is None or within.hyperparameters is None:
        return request.hyperparameters or Hyperparameters()
    if request.hyperparameters is not None:
        raise InvalidRequestError(("hyperparameters", "are within method as well: give them once"))
    return within.hyperparameters


def _learning_rate(request: CreateJobRequest) -> float:
    multiplier = _hyperparameters(request).learning_rate_multiplier
    rate = request.optimizer.learning_rate
    if multiplier is None or isinstance(multiplier, str):
        return rate
    if not rate * multiplier <= MAX_LEARNING_RATE:
        reason = f"times the learning rate of {rate:g} must be at most {MAX_LEARNING_RATE:g}"
        raise InvalidRequestError(("hyperparameters.learning_rate_multiplier", reason))
    return rate * multiplier


def _default_length(session: Session, request: CreateJobRequest) -> int:
    model, _, tokenizer = workload.model_of(session, request)
    data = _counts(session, "dataset", request.training_file, tokenizer)
    checked = [data.tokens]
    if request.validation_fraction is not None:
        checked.append(int(data.tokens * request.validation_fraction))
    if request.validation_file is not None:
        checked.append(_counts(session, "validation_dataset", request.validation_file, tokenizer).tokens)
    return default_length(data.longest_document_tokens, model, None if request.packing == "single" else min(checked))


def default_length(longest_document: int, model: ModelConfig, tokens: int | None) -> int:
    """Tokens per sequence for data whose longest document has so many. `tokens` are those of the smallest set that has
    to fill a sequence, with one more as its last target; None where none has to."""
    length = min(max(1 << (longest_document - 1).bit_length(), MIN_LENGTH), MAX_LENGTH)
    if model.max_positions is not None:
        length = min(length, model.max_positions)
    return length if tokens is None else max(min(length, tokens - 1), 1)


def _counts(session: Session, field: str, file_id: str, tokenizer: TokenizerRef) -> Counts:
    dataset = datasets.get(session, file_id)
    counts = training_data.counts_of(field, dataset, tokenizer)
    if counts is None:
        raise training_data.not_tokenized(session, dataset, tokenizer)
    return counts
