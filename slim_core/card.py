"""README.md of a checkpoint: what it was made of, how, and what came of it. Free of torch.

It says nothing that differs between a run and the same one interrupted: no times, no measured memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning.plan import Plan
from slim_core.weights.source import ModelSource

MAX_POINTS = 64
"""Of a curve."""

Point = Sequence[float]
"""Step and loss."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the model of a run came from, for its checkpoints."""

    source: ModelSource | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """What a card says of data and job: names and ids by what they are."""


NO_ORIGIN = Origin()
"""Of new weights that read bytes."""


@dataclass(slots=True)
class Curves:
    """Losses of a run, nats per token, as few as a card can show. A checkpoint keeps them: a resumed run goes on."""

    training: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)

    def add_training(self, step: int, loss: float, total_steps: int) -> None:
        if step % max(1, -(-total_steps // MAX_POINTS)) == 0 or step == total_steps:
            self.training.append([step, loss])

    def add_validation(self, step: int, loss: float) -> None:
        if len(self.validation) == MAX_POINTS:
            self.validation = self.validation[::2]
        self.validation.append([step, loss])


def model_card(model: ModelConfig, train: TrainConfig, plan: Plan, origin: Origin, curves: Curves, step: int) -> str:
    """The text of README.md after `step` steps."""
    transformers = origin.source is not None and origin.source.fits(model)
    parts = [
        f"---\nlibrary_name: {'transformers' if transformers else 'slimtune'}\n---",
        f"# A checkpoint after {step:,} of {train.steps:,} steps",
        _table([*origin.names.items(), *_training(model, train)]),
        "## Plan",
        _table(_plan(plan)),
        plan.reason,
        "## Losses, nats per token",
        _losses(curves),
        "## Load it",
        _code("from slim_core import load_model", 'model = load_model("this folder")'),
    ]
    if transformers:
        parts.append(
            _code(
                "from transformers import AutoModelForCausalLM",
                'model = AutoModelForCausalLM.from_pretrained("this folder")',
            )
        )
        if train.lora is not None:
            parts.append("The weights have the adapter in them; `adapter/` is the adapter alone, in PEFT's layout.")
    return "\n\n".join(parts) + "\n"


def _training(model: ModelConfig, train: TrainConfig) -> list[tuple[str, str]]:
    method = "all weights"
    if train.lora is not None:
        method = f"LoRA, rank {train.lora.rank}, alpha {train.lora.alpha:g}, of {', '.join(train.lora.targets)}"
    attention: str = model.attention
    if model.attention == "performer":
        attention += f", {model.feature_map} features, {model.features_per_head} a head"
    optimizer = train.optimizer
    matching = []
    if train.matching is not None:
        phase = f"{train.matching.steps:,} updates over {train.matching_length:,} tokens each, before the first step"
        matching = [("matched to softmax attention", phase)]
    return [
        ("parameters", f"{model.num_parameters:,}"),
        ("attention", attention),
        ("trained", method),
        *matching,
        ("sequences", f"{train.batch_size} of {train.sequence_length:,} tokens a step, {train.packing}"),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, {train.schedule.name}"),
        ("precision", train.precision),
        ("seed", str(train.seed)),
    ]


def _plan(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("chunks", f"{plan.num_chunks} of {plan.chunk_length:,} tokens, states: {plan.state_policy}"),
        ("predicted peak", f"{plan.predicted_peak_bytes:,} bytes"),
        ("the ordinary step's", f"{plan.unchunked_peak_bytes:,} bytes"),
    ]


def _losses(curves: Curves) -> str:
    steps = {int(step): [f"{loss:.4f}", ""] for step, loss in curves.training}
    for step, loss in curves.validation:
        steps.setdefault(int(step), ["", ""])[1] = f"{loss:.4f}"
    rows = [(f"{step:,}", *losses) for step, losses in sorted(steps.items())]
    return "\n".join(_row(row) for row in [("step", "training", "validation"), ("---", "---", "---"), *rows])


def _table(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(_row(row) for row in [("", ""), ("---", "---"), *pairs])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _code(*lines: str) -> str:
    return "\n".join(f"    {line}" for line in lines)
