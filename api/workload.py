"""From a request to a plan: the model and data that it names, the rules between its fields, the planner."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy.orm import Session

from api.errors import InvalidRequestError
from api.schemas import ChunkingFields, FullFields, LoraFields, PlanRequest
from service import base_models, calibrations, datasets, devices
from service.errors import DatasetTooSmallError
from service.models import Dataset, Job
from service.status import JobStatus
from slim_core.config import (
    BUILTIN_MODELS,
    EarlyStoppingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from slim_core.planning import (
    Calibration,
    Chunking,
    Plan,
    Workload,
    check_chunking,
    default_calibration,
    plan_with_lessons,
)
from slim_core.planning.shapes import check_adapters

logger = logging.getLogger(__name__)

MAX_STEPS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class PlannedWorkload:
    """A request with everything resolved."""

    model: ModelConfig
    base_model_id: str | None
    train: TrainConfig
    plan: Plan


def resolve(session: Session, request: PlanRequest) -> PlannedWorkload:
    """Check and plan a request.

    Raises InvalidRequestError, NotFoundError for a model or dataset that is not there, DatasetTooSmallError,
    MemoryCapInfeasibleError, MemoryCapExceedsDeviceError.
    """
    _check_rules(request)
    devices.check_cap(session, request.memory_cap)
    dataset = _dataset(session, "dataset", request.dataset, request.sequence_length)
    _dataset(session, "validation_dataset", request.validation_dataset, request.sequence_length)
    model, base_model_id = _model(session, request.model)
    train = _train_config(request, _steps(request, dataset))
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
    plan = plan_with_lessons(workload, request.memory_cap, _calibration(session, workload), chunking=chunking)
    return PlannedWorkload(model=model, base_model_id=base_model_id, train=train, plan=plan)


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
    return plan_with_lessons(workload, memory_cap, _calibration(session, workload), chunking=chunking)


def _check_rules(request: PlanRequest) -> None:
    errors = []
    if (request.steps is None) == (request.epochs is None):
        errors.append(("steps", "give exactly one of steps and epochs"))
    if request.epochs is not None and request.dataset is None:
        errors.append(("epochs", "needs a dataset; without one, give steps"))
    if request.evaluate_every is not None and request.validation_dataset is None:
        errors.append(("evaluate_every", "needs validation_dataset"))
    if request.early_stopping is not None and request.evaluate_every is None:
        errors.append(("early_stopping", "needs evaluate_every"))
    if errors:
        raise InvalidRequestError(*errors)


def _dataset(session: Session, field: str, dataset_id: str | None, sequence_length: int) -> Dataset | None:
    if dataset_id is None:
        return None
    dataset = datasets.get(session, dataset_id)
    if dataset.tokens < sequence_length + 1:
        raise DatasetTooSmallError(field, dataset.id, dataset.tokens, sequence_length)
    return dataset


def _model(session: Session, name: str) -> tuple[ModelConfig, str | None]:
    if (builtin := BUILTIN_MODELS.get(name)) is not None:
        return builtin, None
    row = base_models.get(session, name)
    return ModelConfig.from_json(row.config), row.id


def _steps(request: PlanRequest, dataset: Dataset | None) -> int:
    """Optimiser steps. An epoch is every window of T tokens once: the last token only serves as a target."""
    if request.steps is not None:
        return request.steps
    assert request.epochs is not None  # noqa: S101  # by _check_rules
    assert dataset is not None  # noqa: S101  # by _check_rules
    windows = (dataset.tokens - 1) // request.sequence_length
    steps = request.epochs * -(-windows // request.batch_size)
    if steps > MAX_STEPS:
        raise InvalidRequestError(("epochs", f"are {steps} steps on this dataset; at most {MAX_STEPS} are possible"))
    return steps


def _train_config(request: PlanRequest, steps: int) -> TrainConfig:
    evaluate_every = request.evaluate_every
    if evaluate_every is None and request.validation_dataset is not None:
        evaluate_every = steps
    early_stopping = request.early_stopping
    return TrainConfig(
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        steps=steps,
        optimizer=OptimizerConfig(**request.optimizer.model_dump()),
        schedule=ScheduleConfig(**request.schedule.model_dump()),
        lora=_lora(request.method),
        precision=request.precision,
        dropout=request.dropout,
        label_smoothing=request.label_smoothing,
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


def _calibration(session: Session, workload: Workload) -> Calibration:
    measured = calibrations.for_job(session, workload.model.to_json(), workload.train.to_json())
    if measured is not None:
        try:
            return Calibration.from_json(measured)
        except ValueError as error:
            # A worker of another version reported it; the next one to start replaces it.
            logger.warning("the stored calibration cannot be read, planning with the default: %s", error)
    return default_calibration()
