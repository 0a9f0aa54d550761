"""What requests may say. Answers are in responses.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import Header
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
)

from api.units import SIZE_PATTERN, parse_bytes

INTEGER_END = 2**53
"""Integers are below it, so that every reader of JSON has them as they are (RFC 7493, 2.2)."""
VISIBLE_ASCII = r"[!-~]{1,255}"


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


NO_NUL = r"^[^\x00]*$"
Text = Annotated[str, AfterValidator(_storable), Field(json_schema_extra={"pattern": NO_NUL})]
Reference = Annotated[Text, Field(min_length=1, max_length=100)]
MemoryCap = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(ge=1, lt=INTEGER_END),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": INTEGER_END - 1},
                {"type": "string", "pattern": SIZE_PATTERN},
            ]
        }
    ),
]


MEMORY_CAP = "The most private memory that the trainer process may ever hold: bytes, or a text such as `1.5GiB`."
MAX_SEQUENCE_LENGTH = 16_777_216
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Steps = Annotated[int, Field(ge=1, le=1_000_000_000)]
Epochs = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=INTEGER_END)]
Metadata = dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=512)]]


def _visible(key: str) -> str:
    if not re.fullmatch(VISIBLE_ASCII, key):
        raise ValueError("must be 1 to 255 visible ASCII characters")
    return key


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Names this request for 24 hours: sent again with its key it is answered as before, and makes no "
        "second job. A new key for each job, for example a UUID; quotes are part of it.",
    ),
    AfterValidator(_visible),
    WithJsonSchema({"type": "string", "pattern": f"^{VISIBLE_ASCII}$"}),
]


class StrictRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def tag_by(field: str, default: str) -> Callable[[Any], str]:
    """Which member of a union is meant, as a tag: by one of its fields, which may be left out."""

    def tag(value: Any) -> str:
        if isinstance(value, BaseModel):
            return f"~{getattr(value, field)}"
        return f"~{value.get(field, default)}" if isinstance(value, dict) else f"~{default}"

    return tag


class _OptimizerFields(StrictRequest):
    learning_rate: float = Field(1e-3, gt=0, le=10, description="Peak of the schedule.")
    weight_decay: float = Field(0.01, ge=0, lt=10, description="Of matrices only.")


class AdamWFields(_OptimizerFields):
    """Two numbers of state per weight."""

    name: Literal["adamw"] = "adamw"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0, lt=1)


class AdafactorFields(_OptimizerFields):
    """Hardly any state: one number per row and column of a matrix."""

    name: Literal["adafactor"]


class SgdFields(_OptimizerFields):
    """One number of state per weight; none without momentum."""

    name: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1)


OptimizerChoice = Annotated[
    Annotated[AdamWFields, Tag("~adamw")]
    | Annotated[AdafactorFields, Tag("~adafactor")]
    | Annotated[SgdFields, Tag("~sgd")],
    Discriminator(
        tag_by("name", "adamw"),
        custom_error_type="unknown_optimizer",
        custom_error_message="name must be adamw, adafactor or sgd",
    ),
]


class FullFields(StrictRequest):
    """Train all weights."""

    type: Literal["full"] = "full"


class LoraFields(StrictRequest):
    """Train low-rank adapters beside frozen weights. The output model has them merged in."""

    type: Literal["lora"]
    rank: int = Field(8, ge=1, le=4_096)
    alpha: float = Field(16.0, gt=0, le=1e6, description="Adapters are scaled by alpha / rank.")
    targets: list[Literal["query", "key_value", "output", "mlp_in", "mlp_out"]] = Field(
        ["query", "key_value"], min_length=1, max_length=5, description="Linear layers of each block with an adapter."
    )

    @field_validator("targets")
    @classmethod
    def _each_once(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) < len(targets):
            raise ValueError("must not name a layer twice")
        return targets


MethodChoice = Annotated[
    Annotated[FullFields, Tag("~full")] | Annotated[LoraFields, Tag("~lora")],
    Discriminator(
        tag_by("type", "full"), custom_error_type="unknown_method", custom_error_message="type must be full or lora"
    ),
]


class ScheduleFields(StrictRequest):
    """Linear warm-up, then constant or a half cosine down to `final_fraction` of the peak."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000, description="Optimiser steps.")
    final_fraction: float = Field(0.1, ge=0, le=1)


class MatchingFields(StrictRequest):
    """Before the first step, `performer` attention learns to give what the model's own attention gave, layer by layer.
    Needs `attention: "performer"` and adapters on query or key_value: the frozen weights are the teacher's."""

    steps: int = Field(ge=1, le=1_000_000_000, description="Updates of this phase, one sequence each.")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="AdamW's, of this phase.")
    sequence_length: int = Field(
        512,
        ge=1,
        le=MAX_SEQUENCE_LENGTH,
        description="Tokens of its sequences; those of the job where they are shorter.",
    )


class EarlyStoppingFields(StrictRequest):
    """Stop when the validation loss no longer improves. Needs `evaluate_every`."""

    patience: int = Field(3, ge=1, le=1_000_000, description="Evaluations in a row without improvement.")
    min_delta: float = Field(0.0, ge=0, le=1_000, description="What counts as an improvement, in nats per token.")


class ChunkingFields(StrictRequest):
    """Your own choice in place of the planner's."""

    chunk_length: int = Field(ge=1, le=MAX_SEQUENCE_LENGTH, description="Tokens per chunk.")
    state_policy: Literal["keep", "reverse", "stride", "prefix"] | None = Field(
        None,
        description="Keep the attention state at every chunk's start (the default), recompute it backwards, or keep "
        "some. Softmax attention has `prefix` alone, its keys and values.",
    )


def _chunking_tag(value: Any) -> str:
    return "~fields" if isinstance(value, dict | ChunkingFields) else "~auto"


ChunkingChoice = Annotated[
    Annotated[Literal["auto"], Tag("~auto")] | Annotated[ChunkingFields, Tag("~fields")], Discriminator(_chunking_tag)
]


class TrainingOptions(StrictRequest):
    """What a job may say of its training, in our own requests and in those of OpenAI's shape."""

    attention: Literal["softmax", "performer"] | None = Field(
        None,
        description="For a model of softmax attention: `softmax` (default) trains it as it is, exactly; `performer` "
        "moves its weights into linear attention of random features, whose memory does not grow with the sequence.",
    )
    validation_fraction: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="In place of validation_dataset: this share of the dataset's documents, drawn by the seed, is kept "
        "from training.",
    )
    tokenizer: Reference | None = Field(
        None,
        description="Id of a tokenizer, for a built-in model, whose vocabulary it is then. Without it, bytes; other "
        "models have their own.",
    )
    packing: Literal["packed", "continuous", "single"] = Field(
        "packed",
        description="How documents become sequences: in a row, attention starting afresh with each (`packed`); in a "
        "row as if they were one text (`continuous`); or one document a sequence, the rest of which has no loss, and a "
        "longer one in several (`single`).",
    )
    optimizer: OptimizerChoice = Field(default_factory=AdamWFields)
    schedule: ScheduleFields = Field(default_factory=ScheduleFields)
    matching: MatchingFields | None = None
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of activations and matrix products; weights and their updates stay in float32."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of channels set to zero after each sub-layer.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target's probability spread over the vocabulary."
    )
    gradient_clip: float | None = Field(
        1.0, gt=0, le=1e9, description="Largest global norm of the gradient; null for no clipping."
    )
    evaluate_every: int | None = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Steps between validation losses. Without it, validation data is used once, at the end.",
    )
    evaluate_sequences: int = Field(8, ge=1, le=1_000_000, description="Sequences per validation, at most.")
    checkpoint_every: int | None = Field(
        None, ge=1, le=1_000_000_000, description="Steps between checkpoints; null for one at the end only."
    )
    keep: int = Field(2, ge=2, le=1_000, description="Newest checkpoints to keep. The best one is kept as well.")
    early_stopping: EarlyStoppingFields | None = None
    chunking: ChunkingChoice = Field("auto", description="`auto`, or your own chunk length.")


class PlanRequest(TrainingOptions):
    """The part of a job that decides how it runs."""

    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    model: Reference = Field(
        description="A built-in model's name (GET /models), or the id of an upload or of a finished job's output."
    )
    dataset: Reference | None = Field(None, description="Id of the training data. Needed if `epochs` is given.")
    validation_dataset: Reference | None = Field(None, description="Id of the data for validation losses.")
    memory_cap: MemoryCap = Field(description=MEMORY_CAP)
    sequence_length: int = Field(ge=1, le=MAX_SEQUENCE_LENGTH, description="Tokens per sequence.")
    batch_size: BatchSize = Field(1, description="Sequences per optimiser step.")
    steps: Steps | None = Field(None, description="Optimiser steps. This or `epochs`.")
    epochs: Epochs | None = Field(None, description="Passes over the dataset. This or `steps`.")
    method: MethodChoice = Field(default_factory=FullFields)
    seed: Seed = Field(0, description="Of the initial weights and the order of the data.")
    metadata: Metadata = Field(
        default_factory=dict,
        max_length=16,
        description="Up to 16 pairs of your own; we only keep them.",
        json_schema_extra={"additionalProperties": False},
    )


class JobRequest(PlanRequest):
    """A job to run."""

    dataset: Reference = Field(description="Id of the training data.")


class ResumeRequest(StrictRequest):
    """What changes when a paused job goes on."""

    memory_cap: MemoryCap | None = Field(None, description="Another cap: bytes, or a text such as `1.5GiB`.")


class TokenizationRequest(StrictRequest):
    """What to make a dataset's tokens with."""

    tokenizer: Reference = Field(description="`bytes`, the id of a tokenizer, or that of a model for the model's own.")


class TrainFields(StrictRequest):
    """A byte-pair encoding of the dataset's text."""

    dataset: Reference = Field(description="Id of the dataset to train on.")
    vocab_size: int = Field(ge=300, le=200_000, description="Tokens, all 256 bytes and the special ones among them.")


class TrainTokenizerRequest(StrictRequest):
    """A tokenizer to train."""

    train: TrainFields
    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None


TOKENIZATION_EXAMPLES: dict[str, Any] = {
    "uploaded": {"value": {"tokenizer": "tok_01936f0e4b7a7c3f8d21c5a0b9e4f617"}},
    "of a model": {"value": {"tokenizer": "model_01936f0e5c1d7e11a4b3f0c2d8e96a05"}},
}

RESUME_EXAMPLES: dict[str, Any] = {
    "as before": {"value": {}},
    "under another cap": {"value": {"memory_cap": "2GiB"}},
}

JOB_EXAMPLES: dict[str, Any] = {
    "small": {
        "summary": "Train a small model on 4,096-token sequences under 1 GiB",
        "value": {
            "name": "pydoc, long context",
            "model": "performer-tiny",
            "dataset": "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617",
            "memory_cap": "1GiB",
            "sequence_length": 4096,
            "steps": 200,
            "optimizer": {"name": "adamw", "learning_rate": 0.001},
            "schedule": {"name": "cosine", "warmup_steps": 20},
            "checkpoint_every": 50,
        },
    },
    "validated": {
        "summary": "Two epochs with validation, early stopping and labels",
        "value": {
            "name": "support tickets v3",
            "model": "performer-ptb",
            "dataset": "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617",
            "validation_dataset": "ds_01936f0e5c1d7e11a4b3f0c2d8e96a05",
            "memory_cap": "2GB",
            "sequence_length": 8192,
            "batch_size": 4,
            "epochs": 2,
            "evaluate_every": 25,
            "checkpoint_every": 100,
            "keep": 3,
            "early_stopping": {"patience": 4, "min_delta": 0.002},
            "seed": 7,
            "metadata": {"team": "support", "ticket": "ML-412"},
        },
    },
}

PLAN_EXAMPLES: dict[str, Any] = {
    "question": {
        "summary": "Would 65,536 tokens fit into 1.5 GiB?",
        "value": {"model": "performer-tiny", "memory_cap": "1.5GiB", "sequence_length": 65536, "steps": 1000},
    },
    "fixed": {
        "summary": "What would my own chunk length cost?",
        "value": {
            "model": "performer-ptb",
            "memory_cap": 1500000000,
            "sequence_length": 16384,
            "steps": 100,
            "chunking": {"chunk_length": 512, "state_policy": "reverse"},
        },
    },
}
