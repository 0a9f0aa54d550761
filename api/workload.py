"""From a request to a plan: the model and data that it names, the rules between its fields, the planner."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from sqlalchemy.orm import Session

from api import remembered_plans, training_data
from api.errors import InvalidRequestError
from api.remembered_plans import KnownCalibration
from api.schemas import ChunkingFields, FullFields, LoraFields, PlanRequest
from api.training_data import TrainingData
from service import base_models, calibrations, devices, tokenizers
from service.models import Job
from service.status import JobStatus
from service.storage import Storage
from service.tokenizers import TokenizerRef
from slim_core.config import (
    BUILTIN_MODELS,
    BYTE_VOCABULARY,
    EarlyStoppingConfig,
    LoraConfig,
    MatchingConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from slim_core.planning import (
    Chunking,
    Plan,
    Workload,
    check_chunking,
    default_calibration,
)
from slim_core.planning.shapes import check_adapters

logger = logging.getLogger(__name__)

FEATURES_PER_CHANNEL = 2
"""Of FAVOR+ in place of softmax attention: M = 2 K random features a head."""


@dataclass(frozen=True, slots=True)
class PlannedWorkload:
    """A request with everything resolved."""

    model: ModelConfig
    base_model_id: str | None
    train: TrainConfig
    plan: Plan
    tokenizer: TokenizerRef


def resolve(session: Session, request: PlanRequest, files: Storage) -> PlannedWorkload:
    """Check and plan a request.

    Raises InvalidRequestError, NotFoundError for a model, dataset or tokenizer that is not there, DatasetTooSmallError,
    ModelNotReadyError, DatasetNotTokenizedError, DatasetUnusableError, TokenizerNotReadyError, TokenizerFailedError,
    MemoryCapInfeasibleError, MemoryCapExceedsDeviceError.
    """
    _check_rules(request)
    devices.check_cap(session, request.memory_cap)
    model, base_model_id, tokenizer = model_of(session, request)
    _check_positions(model, request)
    data = training_data.describe(session, request, tokenizer, files)
    train = _train_config(request, data)
    if train.lora is not None:
        try:
            check_adapters(model, train.lora)
        except ValueError as error:
            raise InvalidRequestError(("method.targets", str(error).removeprefix("targets: "))) from error
    workload = Workload(model, train)
    chunking = None
    if isinstance(request.chunking, ChunkingFields):
        chunking = Chunking(request.chunking.chunk_length, request.chunking.state_policy)
        try:
            check_chunking(workload, chunking)
        except ValueError as error:
            field, _, rule = str(error).partition(": ")
            raise InvalidRequestError((f"chunking.{field}", rule)) from error
    plan = remembered_plans.plan(workload, request.memory_cap, _calibration(session, workload), chunking)
    return PlannedWorkload(model=model, base_model_id=base_model_id, train=train, plan=plan, tokenizer=tokenizer)


def check_device(session: Session, job: Job) -> None:
    """Raises MemoryCapExceedsDeviceError for a paused job that no device of today can hold."""
    if job.status == JobStatus.PAUSED.value:
        devices.check_cap(session, job.memory_cap_bytes)


def replan(session: Session, job: Job, memory_cap: int) -> Plan:
    """The plan of a job that exists under another cap. Raises MemoryCapInfeasibleError, MemoryCapExceedsDeviceError."""
    devices.check_cap(session, memory_cap)
    workload = Workload(ModelConfig.from_json(job.model_config), TrainConfig.from_json(job.train))
    own = job.spec.get("chunking", "auto")
    chunking = None if own == "auto" else Chunking(own["chunk_length"], own["state_policy"])
    return remembered_plans.plan(workload, memory_cap, _calibration(session, workload), chunking)


def _check_rules(request: PlanRequest) -> None:
    errors = []
    if (request.steps is None) == (request.epochs is None):
        errors.append(("steps", "give exactly one of steps and epochs"))
    if request.epochs is not None and request.dataset is None:
        errors.append(("epochs", "needs a dataset; without one, give steps"))
    if request.validation_fraction is not None and request.validation_dataset is not None:
        errors.append(("validation_fraction", "is in place of validation_dataset: give one of both"))
    if request.evaluate_every is not None and not _has_validation(request):
        errors.append(("evaluate_every", "needs validation_dataset or validation_fraction"))
    if request.early_stopping is not None and request.evaluate_every is None:
        errors.append(("early_stopping", "needs evaluate_every"))
    if request.matching is not None:
        errors += _problems_of_matching(request)
    if errors:
        raise InvalidRequestError(*errors)


def _problems_of_matching(request: PlanRequest) -> Iterator[tuple[str, str]]:
    if request.attention != "performer":
        yield "matching", 'needs attention "performer": there is nothing else that could be matched'
    if not isinstance(request.method, LoraFields):
        yield "method", 'must be {"type": "lora"} for matching: the frozen weights are those of the model to match'
    elif not {"query", "key_value"} & {*request.method.targets}:
        yield "method.targets", "must have query or key_value for matching"


def _has_validation(request: PlanRequest) -> bool:
    return request.validation_dataset is not None or request.validation_fraction is not None


class NamesModel(Protocol):
    """A request, in any shape, that names a model."""

    @property
    def model(self) -> str: ...

    @property
    def tokenizer(self) -> str | None: ...

    @property
    def attention(self) -> Literal["softmax", "performer"] | None: ...


def model_of(session: Session, request: NamesModel) -> tuple[ModelConfig, str | None, TokenizerRef]:
    """Configuration, row and tokenizer of the model that a request names.

    Raises InvalidRequestError, NotFoundError, ModelNotReadyError, TokenizerNotReadyError, TokenizerFailedError.
    """
    if (builtin := BUILTIN_MODELS.get(request.model)) is not None:
        if request.tokenizer is None:
            return _with_attention(builtin, request.attention), None, tokenizers.BYTES
        reference = tokenizers.resolve(session, request.tokenizer)
        vocab_size = reference.vocab_size or builtin.vocab_size
        model = dataclasses.replace(builtin, vocab_size=vocab_size)
        return _with_attention(model, request.attention), None, reference
    if request.tokenizer is not None:
        raise InvalidRequestError(("tokenizer", "is for built-in models; this model has its own"))
    row = base_models.ready(session, request.model)
    assert row.config is not None  # noqa: S101  # by the table's constraint
    model, reference = ModelConfig.from_json(row.config), tokenizers.of_model(row)
    if reference == tokenizers.BYTES and model.vocab_size < BYTE_VOCABULARY:
        reason = f"has a vocabulary of {model.vocab_size} and no tokenizer.json; bytes need {BYTE_VOCABULARY}"
        raise InvalidRequestError(("model", reason))
    return _with_attention(model, request.attention), row.id, reference


def _with_attention(model: ModelConfig, attention: Literal["softmax", "performer"] | None) -> ModelConfig:
    """The model in training. Raises InvalidRequestError where it has no softmax attention to keep or to replace."""
    if attention is None:
        return model
    if model.attention != "softmax":
        raise InvalidRequestError(
            ("attention", f"is a choice for softmax attention; this model's is {model.attention}")
        )
    if attention == "softmax":
        return model
    return dataclasses.replace(
        model,
        attention="performer",
        feature_map="favor",
        num_features=FEATURES_PER_CHANNEL * model.head_width,
    )


def _check_positions(model: ModelConfig, request: PlanRequest) -> None:
    if model.max_positions is not None and request.sequence_length > model.max_positions:
        reason = f"must be at most {model.max_positions}: the model has learned no further positions"
        raise InvalidRequestError(("sequence_length", reason))


def _train_config(request: PlanRequest, data: TrainingData) -> TrainConfig:
    steps = data.steps
    evaluate_every = request.evaluate_every
    if evaluate_every is None and _has_validation(request):
        evaluate_every = steps
    early_stopping = request.early_stopping
    return TrainConfig(
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        steps=steps,
        optimizer=OptimizerConfig(**request.optimizer.model_dump()),
        schedule=ScheduleConfig(**request.schedule.model_dump()),
        lora=_lora(request.method),
        matching=None if request.matching is None else MatchingConfig(**request.matching.model_dump()),
        precision=request.precision,
        dropout=request.dropout,
        label_smoothing=request.label_smoothing,
        packing=data.packing,
        validation_fraction=request.validation_fraction,
        gradient_clip=request.gradient_clip,
        evaluate_every=evaluate_every,
        evaluate_sequences=request.evaluate_sequences,
        checkpoint_every=request.checkpoint_every,
        early_stopping=None if early_stopping is None else EarlyStoppingConfig(**early_stopping.model_dump()),
        seed=request.seed,
    )


def _lora(method: FullFields | LoraFields) -> LoraConfig | None:
    if isinstance(method, FullFields):
        return None
    return LoraConfig(method.rank, method.alpha, tuple(method.targets))


def _calibration(session: Session, workload: Workload) -> KnownCalibration:
    measured = calibrations.for_job(session, workload.model.to_json(), workload.train.to_json())
    if measured is not None:
        try:
            return remembered_plans.calibration_of(measured)
        except ValueError as error:
            # A worker of another version reported it; the next one to start replaces it.
            logger.warning("the stored calibration cannot be read, planning with the default: %s", error)
    return remembered_plans.calibration_of(default_calibration().to_json())
