"""What OpenAI's clients may say, and what of our own goes along with it (`extra_body`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from api.schemas import (
    INTEGER_END,
    MAX_SEQUENCE_LENGTH,
    MEMORY_CAP,
    BatchSize,
    Epochs,
    FullFields,
    LoraFields,
    MemoryCap,
    Metadata,
    Reference,
    Seed,
    Steps,
    StrictRequest,
    Text,
    TrainingOptions,
    tag_by,
)

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3_600, 2_592_000
"""An hour and 30 days: OpenAI's limits."""


def _number_tag(value: Any) -> str:
    return "~auto" if isinstance(value, str) else "~number"


Auto = Annotated[Literal["auto"], Tag("~auto")]
AutoEpochs = Annotated[Auto | Annotated[Epochs, Tag("~number")], Discriminator(_number_tag)]
AutoBatchSize = Annotated[Auto | Annotated[BatchSize, Tag("~number")], Discriminator(_number_tag)]
AutoMultiplier = Annotated[
    Auto | Annotated[Annotated[float, Field(gt=0, le=10_000)], Tag("~number")], Discriminator(_number_tag)
]


class Hyperparameters(StrictRequest):
    """`auto` is what is given as the default."""

    n_epochs: AutoEpochs | None = Field(None, description="Passes over the file; 1 unless `steps` is given.")
    batch_size: AutoBatchSize | None = Field(None, description="Sequences per optimiser step; 1.")
    learning_rate_multiplier: AutoMultiplier | None = Field(
        None, description="Times the optimizer's `learning_rate`, 1e-3 by default; 1."
    )


class SupervisedOptions(StrictRequest):
    hyperparameters: Hyperparameters | None = None


class SupervisedFields(StrictRequest):
    """OpenAI's way to say what trains all weights here."""

    type: Literal["supervised"] = "supervised"
    supervised: SupervisedOptions | None = None


Method = Annotated[
    Annotated[SupervisedFields, Tag("~supervised")]
    | Annotated[FullFields, Tag("~full")]
    | Annotated[LoraFields, Tag("~lora")],
    Discriminator(
        tag_by("type", "supervised"),
        custom_error_type="unknown_method",
        custom_error_message="type must be supervised, full or lora",
    ),
]


def _no_integrations(value: list[Any] | None) -> list[Any] | None:
    if value:
        raise ValueError("are not supported: leave them out")
    return value


NoIntegrations = Annotated[list[Any], Field(json_schema_extra={"maxItems": 0})]


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError('is required: the most memory that training may hold, as extra_body={"memory_cap": "1GiB"}')
    return value


class CreateJobRequest(TrainingOptions):
    """A fine-tuning job in OpenAI's shape. What OpenAI does not know comes through `extra_body`: `memory_cap`, which is
    required, and the other fields of POST /jobs."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "training_file", "memory_cap"]})

    model: Reference = Field(description="Id of a model, as GET /v1/models lists them.")
    training_file: Reference = Field(description="Id of a file with the purpose `fine-tune`.")
    validation_file: Reference | None = Field(None, description="Id of the file for validation losses.")
    memory_cap: Annotated[MemoryCap | None, BeforeValidator(_given)] = Field(
        None, validate_default=True, description=MEMORY_CAP
    )
    method: Method = Field(default_factory=SupervisedFields, description="OpenAI's `supervised`, or as in POST /jobs.")
    hyperparameters: Hyperparameters | None = Field(
        None, description="As within `method`; there for clients of before."
    )
    steps: Steps | None = Field(None, description="Optimiser steps, in place of `n_epochs`.")
    sequence_length: int | None = Field(
        None,
        ge=1,
        le=MAX_SEQUENCE_LENGTH,
        description="Tokens per sequence. Default: the smallest power of two that holds the longest document, from 64 "
        "to 8,192, and no more than the data and the model allow.",
    )
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = Field(
        None, description="Name of the job and of the model that comes of it."
    )
    seed: Seed | None = Field(None, description="Default: 0.")
    metadata: Metadata | None = Field(None, max_length=16, description="Up to 16 pairs of your own.")
    integrations: Annotated[NoIntegrations | None, AfterValidator(_no_integrations)] = Field(
        None, description="None are supported: null or empty."
    )


class ExpiresAfter(StrictRequest):
    """When the file is deleted by itself, unless a job still reads it."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)


class CreateUploadRequest(StrictRequest):
    """A file that will come in parts."""

    bytes: int = Field(ge=1, lt=INTEGER_END, description="Of the whole file.")
    filename: Annotated[Text, Field(min_length=1, max_length=1_000)]
    mime_type: Annotated[Text, Field(max_length=255)] = Field(
        "", description="Not looked at: the name's ending says what it is."
    )
    purpose: Literal["fine-tune"]
    expires_after: ExpiresAfter | None = None


class CompleteUploadRequest(StrictRequest):
    """The parts in the order of the file."""

    part_ids: list[Reference] = Field(min_length=1, max_length=10_000)
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = Field(None, description="Of the whole file, hex.")


FILE_ID = "ds_01936f0e4b7a7c3f8d21c5a0b9e4f617"
JOB_EXAMPLES: dict[str, Any] = {
    "small": {
        "summary": "One pass over a file, under 1 GiB",
        "value": {"model": "performer-tiny", "training_file": FILE_ID, "memory_cap": "1GiB"},
    },
    "supervised": {
        "summary": "With OpenAI's hyperparameters, and fields of our own",
        "value": {
            "model": "performer-tiny",
            "training_file": FILE_ID,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 3, "learning_rate_multiplier": 0.5}},
            },
            "suffix": "tickets",
            "seed": 7,
            "metadata": {"team": "support"},
            "memory_cap": "1GiB",
            "sequence_length": 2048,
        },
    },
    "lora": {
        "summary": "Adapters of low rank, 100 steps",
        "value": {
            "model": "model_01936f0e5c1d7e11a4b3f0c2d8e96a05",
            "training_file": FILE_ID,
            "memory_cap": "1500MiB",
            "method": {"type": "lora", "rank": 8},
            "sequence_length": 2048,
            "steps": 100,
        },
    },
}
UPLOAD_EXAMPLES: dict[str, Any] = {
    "file": {
        "value": {
            "bytes": 137172,
            "filename": "train.jsonl.gz",
            "mime_type": "application/gzip",
            "purpose": "fine-tune",
        }
    }
}
COMPLETE_EXAMPLES: dict[str, Any] = {
    "two parts": {
        "value": {
            "part_ids": ["part_01936f0e4b7a7c3f8d21c5a0b9e4f617", "part_01936f0e5c1d7e11a4b3f0c2d8e96a05"],
            "md5": "9e107d9d372bb6826bd81d3542a419d6",
        }
    }
}
