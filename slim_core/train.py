"""The training loop: a generator of what happened, one report at a time. Knows no job and no pipe."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from slim_core.compilation import compile_blocks
from slim_core.config import TrainConfig
from slim_core.data.dataset import Windows
from slim_core.data.tokens import DatasetError
from slim_core.layers.dropout import Dropout
from slim_core.matching import Matcher
from slim_core.memory import MemoryMeter
from slim_core.model import LanguageModel
from slim_core.optim import learning_rate, make_optimizer, set_step
from slim_core.origin import NO_ORIGIN, Curves, Origin, model_card
from slim_core.planning.plan import Plan
from slim_core.step import evaluate_loss, slim_step
from slim_core.weights.checkpoint import checkpoint_name, load_progress, load_training, save_checkpoint
from slim_core.weights.files import CheckpointFile
from slim_core.weights.lora import add_adapters

CHECKPOINT_SECONDS = 300.0
"""Time between checkpoints of a run that names no number of steps, and of the phase of matching: what a crash may cost
it."""
MATCHING_REPORTS = 20
"""Of the phase, at most."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean training loss, nats per target; 0 for a step none of whose sequences has a target, which changes nothing."""
    learning_rate: float
    grad_norm: float
    """Global norm of the gradient before clipping."""
    step_seconds: float
    tokens: int
    """Trained on so far, repetitions, padding and what has no loss included."""
    peak_bytes: int
    """Of the process, so far in this attempt."""


@dataclass(frozen=True, slots=True)
class Matching:
    """Some updates of the phase before the first step (`slim_core.matching`)."""

    step: int
    """Of the phase, counted from 1."""
    of: int
    relative_error: float
    """Of attention's outputs, mean over the updates since the last report."""
    step_seconds: float
    """Likewise."""
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A validation loss: after step 0 that of the weights which training starts from."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder that is complete and on disk."""

    step: int
    name: str
    files: list[CheckpointFile]
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """The gradient of one real sequence under the plan beside the same under another chunk length."""

    chunk_length: int
    compared_with: int
    """The other chunk length; the whole sequence is the ordinary step."""
    relative_error: float
    """Norm of the difference over the norm of the gradient, all trained weights together."""


@dataclass(frozen=True, slots=True)
class Done:
    """The last report. `reason`: completed, early_stopping, or stopped on request."""

    step: int
    reason: str


Report = Matching | StepMetrics | Evaluation | Checkpoint | Done


class DivergedError(ArithmeticError):
    """The loss or the gradient is not a finite number any more. The weights are those before the step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"{what} of step {step} is not finite")
        self.step = step


class _StopRequestedError(Exception):
    """Raised between two chunks, so that a long step does not delay a stop."""


@dataclass(slots=True)
class _Progress:
    """What a checkpoint holds beside weights and moments. Data order and learning rate follow from `step`."""

    step: int = 0
    matched: int = 0
    """Updates of the phase of matching; a checkpoint from within it has that phase's moments."""
    best_validation_loss: float | None = None
    evaluations_without_improvement: int = 0
    curves: Curves = field(default_factory=Curves)


class TrainingRun:
    """A model in training under a plan. Iterate over `reports()` once."""

    def __init__(
        self,
        model: LanguageModel,
        config: TrainConfig,
        plan: Plan,
        data: Windows,
        validation: Windows | None,
        checkpoints_dir: Path,
        meter: MemoryMeter,
        stop_requested: Callable[[], bool] = lambda: False,
        origin: Origin = NO_ORIGIN,
    ) -> None:
        self._model = model
        self._config = config
        self._plan = plan
        self._data = data
        self._validation = validation
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        self._checkpoints_dir = checkpoints_dir
        self._meter = meter
        self._stop_requested = stop_requested
        self._origin = origin
        self._device = next(model.parameters()).device
        if config.lora is not None:
            add_adapters(model, config.lora, config.seed)
        if config.precision == "bfloat16":
            model.compute_dtype = torch.bfloat16
        if config.compile:
            compile_blocks(model)
        self._optimizer = make_optimizer(model, config.optimizer)
        meter.keep_within(plan.predicted_peak_bytes)
        self._progress = _Progress()
        self._saved: tuple[int, int] | None = None
        """Step and updates of matching that the newest checkpoint has."""
        self._matcher: Matcher | None = None
        self._saved_at = time.monotonic()
        self._validation_loss: float | None = None
        """Of the weights as they are now; None when not evaluated."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self._progress.step

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint, bit for bit under the same plan, thread count and torch version."""
        matched = int(load_progress(folder).get("matched", 0))
        within_matching = self._config.matching is not None and matched < self._config.matching.steps
        optimizer = self._matching().optimizer if within_matching else self._optimizer
        training: dict[str, Any] = load_training(self._model, optimizer, folder)
        if within_matching:
            set_step(optimizer, matched)
        self._progress = _Progress(**{**training, "curves": Curves(**training.get("curves", {}))})
        self._saved = (self._progress.step, self._progress.matched)

    def probe(self) -> int:
        """Peak in bytes after the next step's first micro-batch, whose gradient is thrown away.

        It shows within one micro-batch, and before any weight has changed, whether the plan holds what it promises.
        Raises what the allocator raises at the cap.
        """
        if self._progress.step < self._config.steps:
            try:
                self._add_gradient(self._progress.step, first=0)
            except _StopRequestedError:
                pass  # the loop will see it too, and save
            finally:
                self._optimizer.zero_grad(set_to_none=False)
        return self._meter.peak_bytes()

    def check_gradient(self, other_chunk_length: int) -> GradientCheck:
        """Compare the plan's gradient with that of another chunk length, in the memory of the longer chunk's step.

        The second gradient is taken away from the first where that lies. Raises what the allocator raises, and
        DatasetError where the last step has no gradient.
        """
        step = self._config.steps - 1
        first = self._first_with_targets(step)
        try:
            self._add_gradient(step, first, count=1)
            norm = self._gradient_norm()
            self._add_gradient(step, first, count=1, chunk_length=other_chunk_length, weight=-1.0)
            error = self._gradient_norm() / norm
            if not math.isfinite(error):
                raise DivergedError(self._progress.step, "the gradient after")
            return GradientCheck(self._plan.chunk_length, other_chunk_length, error)
        finally:
            self._optimizer.zero_grad(set_to_none=False)

    def reports(self) -> Iterator[Report]:
        """Train to the end and say what happens. Raises DivergedError, and what the allocator raises at the cap."""
        config, progress = self._config, self._progress
        reason = "completed"
        try:
            yield from self._match()
            yield from self._evaluations()
            while progress.step < config.steps and not self._patience_is_over():
                yield self._train_step()
                yield from self._evaluations()
                if self._checkpoint_due() and self._saved != (progress.step, progress.matched):
                    yield self._save()
        except _StopRequestedError:
            reason = "stopped"
            self._model.redraw_features(max(progress.step - 1, 0))  # those that the weights have seen
        if reason == "completed" and self._progress.step < config.steps:
            reason = "early_stopping"
        if self._saved != (self._progress.step, self._progress.matched):
            yield self._save()
        yield Done(self._progress.step, reason)

    def _evaluations(self) -> Iterator[Report]:
        """The validation loss where it is due and not known: of the weights before the first step, every so many steps,
        at the end; or after a resume from where a stop came between a step and its evaluation. The best so far is
        saved. Raises DivergedError, _StopRequestedError."""
        step, known = self._progress.step, self._progress.curves.validation
        due = step in (0, self._config.steps) or _due(step, self._config.evaluate_every)
        if self._validation is None or not due or (known and known[-1][0] == step):
            return
        evaluation, improved = self._evaluate(self._validation)
        yield evaluation
        if improved and step > 0:
            yield self._save()

    def _match(self) -> Iterator[Report]:
        """What is left of the phase of matching, if the run has one; fine-tuning then starts from a checkpoint with
        moments of its own. Raises DivergedError, _StopRequestedError."""
        config, progress = self._config.matching, self._progress
        if config is None or progress.matched == config.steps:
            return
        matcher = self._matching()
        self._model.redraw_features(0)
        every = -(-config.steps // MATCHING_REPORTS)
        errors: list[float] = []
        started = time.perf_counter()
        while progress.matched < config.steps:
            errors.append(matcher.step(progress.matched, self._data, self._stop_between_chunks).relative_error)
            if not math.isfinite(errors[-1]):
                raise DivergedError(0, "the error of matching before")
            progress.matched += 1
            if progress.matched % every == 0 or progress.matched == config.steps:
                error, seconds = statistics.fmean(errors), (time.perf_counter() - started) / len(errors)
                yield Matching(progress.matched, config.steps, error, seconds, self._meter.peak_bytes())
                errors, started = [], time.perf_counter()
            if progress.matched < config.steps and time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS:
                yield self._save()
        self._matcher = None
        del matcher  # its moments, before anything else needs room
        yield self._save()

    def _matching(self) -> Matcher:
        self._matcher = self._matcher or Matcher(self._model, self._config)
        return self._matcher

    def _train_step(self) -> StepMetrics:
        started = time.perf_counter()
        step = self._progress.step
        rate = learning_rate(step, self._config.steps, self._config.optimizer.learning_rate, self._config.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = self._accumulate_gradients(step)
            grad_norm = self._clip()
        except BaseException:
            self._optimizer.zero_grad(set_to_none=False)
            raise
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergedError(step + 1, "the gradient" if math.isfinite(loss) else "the loss")
        if self._num_targets(step):  # else there is no gradient, and weight decay alone would move the weights
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        self._progress.step = step + 1
        self._progress.curves.add_training(step + 1, loss, self._config.steps)
        self._validation_loss = None
        return StepMetrics(
            step=step + 1,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            step_seconds=time.perf_counter() - started,
            tokens=(step + 1) * self._config.batch_size * self._config.sequence_length,
            peak_bytes=self._meter.peak_bytes(),
        )

    def _accumulate_gradients(self, step: int) -> float:
        # One micro-batch at a time: the token ids of the others would be memory that no plan counts.
        micro_batches = range(0, self._config.batch_size, self._plan.micro_batch_size)
        return sum(self._add_gradient(step, first) for first in micro_batches)

    def _add_gradient(
        self, step: int, first: int, count: int | None = None, chunk_length: int | None = None, weight: float = 1.0
    ) -> float:
        """Of sequences `first` and after of the step's batch, a micro-batch unless `count` says how many; returns their
        share of the loss."""
        config, plan = self._config, self._plan
        self._model.redraw_features(step)
        count = min(count or plan.micro_batch_size, config.batch_size - first)
        batch = self._data.batch(step * config.batch_size + first, count).to(self._device)
        return slim_step(
            self._model,
            batch.tokens,
            batch.targets,
            chunk_length=chunk_length or plan.chunk_length,
            state_policy=plan.state_policy,
            weight=weight,
            dropout=Dropout(config.dropout, config.seed, step, first_row=first),
            label_smoothing=config.label_smoothing,
            normaliser=max(1, self._num_targets(step)),
            document_starts=batch.document_starts,
            between_chunks=self._stop_between_chunks,
        )

    def _num_targets(self, step: int) -> int:
        """Of the whole step, micro-batches together."""
        return self._data.num_targets(step * self._config.batch_size, self._config.batch_size)

    def _first_with_targets(self, step: int) -> int:
        """A sequence of the step that has a gradient."""
        first, size = step * self._config.batch_size, self._config.batch_size
        for row in range(size):
            if self._data.num_targets(first + row, 1):
                return row
        raise DatasetError("no sequence of the step has a target with a loss")

    def _gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None]))

    def _stop_between_chunks(self) -> None:
        if self._stop_requested():
            raise _StopRequestedError

    def _clip(self) -> float:
        limit = math.inf if self._config.gradient_clip is None else self._config.gradient_clip
        return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), limit))

    def _evaluate(self, validation: Windows) -> tuple[Evaluation, bool]:
        """The validation loss, and whether it is the best so far. Sequences without a target do not count as one."""
        counts = ((index, validation.num_validation_targets(index, 1)) for index in range(validation.per_epoch))
        total, targets_seen = 0.0, 0
        for index, num_targets in itertools.islice(filter(_has_targets, counts), self._config.evaluate_sequences):
            batch = validation.validation(index, count=1).to(self._device)
            total += evaluate_loss(
                self._model,
                batch.tokens,
                batch.targets,
                chunk_length=self._plan.chunk_length,
                document_starts=batch.document_starts,
                between_chunks=self._stop_between_chunks,
            )
            targets_seen += num_targets
        if not targets_seen:
            raise DatasetError("no sequence of the validation data has a target with a loss")
        loss = total / targets_seen
        if not math.isfinite(loss):
            raise DivergedError(self._progress.step, "the validation loss")
        self._validation_loss = loss
        self._progress.curves.add_validation(self._progress.step, loss)
        progress, stopping = self._progress, self._config.early_stopping
        best = progress.best_validation_loss
        improved = best is None or loss < best
        enough = best is None or loss < best - (stopping.min_delta if stopping else 0.0)
        progress.evaluations_without_improvement = 0 if enough else progress.evaluations_without_improvement + 1
        if improved:
            progress.best_validation_loss = loss
        return Evaluation(progress.step, loss), improved

    def _patience_is_over(self) -> bool:
        stopping = self._config.early_stopping
        return stopping is not None and self._progress.evaluations_without_improvement >= stopping.patience

    def _checkpoint_due(self) -> bool:
        every = self._config.checkpoint_every
        if every is None:
            return time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS
        return _due(self._progress.step, every)

    def _save(self) -> Checkpoint:
        progress = self._progress
        training = asdict(progress)
        card = model_card(self._model.config, self._config, self._plan, self._origin, progress.curves, progress.step)
        files = save_checkpoint(
            self._checkpoints_dir,
            training.pop("step"),
            self._model,
            self._optimizer if self._matcher is None else self._matcher.optimizer,
            training,
            source=self._origin.source,
            card=card,
        )
        self._saved = (progress.step, progress.matched)
        self._saved_at = time.monotonic()
        return Checkpoint(progress.step, checkpoint_name(progress.step), files, self._validation_loss)


def _has_targets(sequence: tuple[int, int]) -> bool:
    return sequence[1] > 0


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
