"""Where the model of a run came from, and what its checkpoints say and take along of it. Free of torch.

A card says nothing that differs between a run and the same one interrupted: no times, no measured memory. What the
certificate adds is known when the last checkpoint is written already, and stays with the job.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning.plan import Plan
from slim_core.weights.card import Card, CardData, CardLoss, CardPlan, render
from slim_core.weights.source import ModelSource

MAX_POINTS = 64
"""Of a curve."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a card calls things."""

    model: str
    """The one in training."""
    data: str
    memory_cap_bytes: int
    base_model: str | None = None
    """None for new weights."""
    tokenizer: str | None = None
    validation: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Of the model of a run. Without `names` its checkpoints have no card."""

    source: ModelSource | None = None
    names: Names | None = None


NO_ORIGIN = Origin()
"""Of new weights that read bytes."""


@dataclass(slots=True)
class Curves:
    """Losses of a run, nats per token, as few as a card can show. A checkpoint keeps them: a resumed run goes on."""

    training: list[list[float]] = field(default_factory=list)
    """[step, loss] of steps at equal distances, and of the last."""
    validation: list[list[float]] = field(default_factory=list)
    """[step, loss], of step 0 and others."""

    def add_training(self, step: int, loss: float, total_steps: int) -> None:
        if step % max(1, -(-total_steps // MAX_POINTS)) == 0 or step == total_steps:
            self.training.append([step, loss])

    def add_validation(self, step: int, loss: float) -> None:
        if len(self.validation) == MAX_POINTS:
            self.validation = self.validation[::2]
        self.validation.append([step, loss])

    def points(self) -> list[CardLoss]:
        """Both, by step."""
        training = {int(step): loss for step, loss in self.training}
        validation = {int(step): loss for step, loss in self.validation}
        return [CardLoss(step, training.get(step), validation.get(step)) for step in sorted({*training, *validation})]


def model_card(
    model: ModelConfig, train: TrainConfig, plan: Plan, origin: Origin, curves: Curves, step: int
) -> str | None:
    """The text of README.md after `step` steps; None where nobody has said what to call things."""
    names = origin.names
    if names is None:
        return None
    card = Card(
        model=names.model,
        base_model=names.base_model,
        parameters=model.num_parameters,
        step=step,
        steps=train.steps,
        data=CardData(names.data, tokenizer=names.tokenizer, validation=names.validation),
        plan=CardPlan(
            memory_cap_bytes=names.memory_cap_bytes,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            sequence_length=train.sequence_length,
            batch_size=train.batch_size,
            chunk_length=plan.chunk_length,
            state_policy=plan.state_policy,
            precision=train.precision,
            lora_rank=None if train.lora is None else train.lora.rank,
            matching=None if train.matching is None else (train.matching.steps, train.matching_length),
        ),
        losses=curves.points(),
        loads_in_transformers=origin.source is not None and origin.source.fits(model),
    )
    return render(card)
