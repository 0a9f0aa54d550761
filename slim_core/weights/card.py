"""README.md of a checkpoint: what was trained on what, how, and what came of it. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_CURVE_ROWS = 20
"""Of the table of losses, at most: the first, the last, and those at equal distances between."""


@dataclass(frozen=True, slots=True)
class CardData:
    """The data, in numbers; None for what is not known."""

    name: str
    documents: int | None = None
    tokens: int | None = None
    tokenizer: str | None = None
    validation: str | None = None
    """What the validation loss is of, in words."""


@dataclass(frozen=True, slots=True)
class CardPlan:
    """How it was trained, and what that took."""

    memory_cap_bytes: int
    predicted_peak_bytes: int
    sequence_length: int
    batch_size: int
    chunk_length: int
    state_policy: str
    precision: str = "float32"
    lora_rank: int | None = None
    """Of the adapters that were trained; None where all weights were."""
    matching: tuple[int, int] | None = None
    """Updates and tokens of each, of the phase in which attention learnt to give what softmax attention gave."""


@dataclass(frozen=True, slots=True)
class CardLoss:
    """A point of the curve, nats per token."""

    step: int
    training: float | None = None
    validation: float | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """All that a card says."""

    model: str
    """Name of this model."""
    parameters: int
    step: int
    steps: int
    data: CardData
    plan: CardPlan
    base_model: str | None = None
    """Name of the model that it was trained from."""
    license: str | None = None
    """Identifier of the base model's licence, if known."""
    losses: Sequence[CardLoss] = ()
    """In the order of steps; the first may be step 0, before training."""
    loads_in_transformers: bool = False
    """Whether the folder is in a layout of that library; a run with adapters then has one in PEFT's layout as well."""


def render(card: Card) -> str:
    """Markdown."""
    parts = [_front_matter(card), f"# {_plain(card.model)}", _introduction(card), _data(card.data), _training(card)]
    if card.losses:
        parts.append(_curve(card.losses))
    parts += [_usage(card), _licence(card)]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    """What model hubs read."""
    lines = ["library_name: transformers"] if card.loads_in_transformers else []
    if card.base_model is not None:
        lines.append(f'base_model: "{_plain(card.base_model)}"')
    if card.license is not None:
        lines.append(f'license: "{_plain(card.license)}"')
    return "\n".join(["---", *lines, "---"])


def _introduction(card: Card) -> str:
    start = "from new weights" if card.base_model is None else f"from {_plain(card.base_model)}"
    share = "" if card.step == card.steps else f" of {card.steps:,}"
    return f"A language model of {card.parameters:,} parameters, trained {start} for {card.step:,}{share} steps."


def _data(data: CardData) -> str:
    rows = [
        ("dataset", _plain(data.name)),
        ("documents", _count(data.documents)),
        ("tokens", _count(data.tokens)),
        ("tokenizer", data.tokenizer and _plain(data.tokenizer)),
        ("validation", data.validation and _plain(data.validation)),
    ]
    return "## Data\n\n" + _table(("", ""), [(name, value) for name, value in rows if value is not None])


def _training(card: Card) -> str:
    plan = card.plan
    what = "all weights" if plan.lora_rank is None else f"adapters of rank {plan.lora_rank} (LoRA), merged"
    rows = [
        ("trained", what),
        ("sequence length", f"{plan.sequence_length:,} tokens"),
        ("batch size", f"{plan.batch_size:,}"),
        ("precision", plan.precision),
        ("memory cap", _bytes(plan.memory_cap_bytes)),
        ("planned peak", _bytes(plan.predicted_peak_bytes)),
    ]
    rows.append(("plan", f"chunks of {plan.chunk_length:,} tokens, states: {plan.state_policy}"))
    if plan.matching is not None:
        updates, length = plan.matching
        rows.append(("matching", f"{updates:,} updates of {length:,} tokens to give what softmax attention gave"))
    note = "The job's certificate has the measured peak and the gradient beside that of another plan."
    return f"## Training\n\n{_table(('', ''), rows)}\n\n{note}"


def _curve(losses: Sequence[CardLoss]) -> str:
    count = min(len(losses), _CURVE_ROWS)
    chosen = [losses[round(number * (len(losses) - 1) / max(count - 1, 1))] for number in range(count)]
    rows = [(f"{loss.step:,}", _loss(loss.training), _loss(loss.validation)) for loss in chosen]
    return "## Loss\n\nNats per token.\n\n" + _table(("step", "training", "validation"), rows)


def _usage(card: Card) -> str:
    if card.loads_in_transformers:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained(".")',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
        ]
        note = "\n\n`adapter/` is the same training as an adapter of the base model, in PEFT's layout."
    else:
        lines = ["from slim_core import load_model", 'model = load_model(".")']
        note = "\n\nPEFT has no adapter for this kind of model; the weights have it merged."
    code = "## Usage\n\n```python\n" + "\n".join(lines) + "\n```"
    return code if card.plan.lora_rank is None else code + note


def _licence(card: Card) -> str:
    if card.base_model is None:
        return "The licence of the data may bind what is done with this model."
    known = f" ({_plain(card.license)})" if card.license else ""
    return f"The licence of {_plain(card.base_model)}{known} applies to this model, and that of the data may."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """A name from a user as one line that neither a table nor front matter reads as its own."""
    return "".join(" " if char in '|"\\`<>\n\r' or not char.isprintable() else char for char in text)[:200]


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB ({count:,} bytes)"
