"""Character language models at the published code's Penn Treebank configuration, on text that is installed already.

The text is that of Python's own `pydoc_data.topics`; the last tenth is for validation.
"""

from __future__ import annotations

from functools import lru_cache
from pydoc_data.topics import topics

import torch
from torch import Tensor

from benchmarks.paper_runs import BITS, Run, initialise_as_published
from slim_core.config import ModelConfig
from slim_core.data.tokenizer import ByteTokenizer
from slim_core.model import LanguageModel
from slim_core.step import evaluate_loss

STEPS = 600
"""A fiftieth of the published 30,000: the claim is that the curves are one curve, from the first step on."""
SEQUENCE_LENGTH = 1_024
SEED = 42
LEARNING_RATE = 1e-4
VALIDATION_SHARE = 0.1
MODEL = ModelConfig(
    num_layers=3,
    model_width=512,
    num_heads=8,
    mlp_width=2_048,
    output_projection=False,
    positions="concatenated",
    attention_bias=True,
    norm="branch",
)


def runs(steps: int | None) -> list[Run]:
    """Whole sequences, chunks of 512 and of 256."""
    count = steps or STEPS
    return [
        _run("language-full", "full", count, SEQUENCE_LENGTH),
        _run("language-512", "C = 512", count, 512),
        _run("language-256", "C = 256", count, 256),
    ]


def _run(name: str, label: str, steps: int, chunk_length: int) -> Run:
    return Run(
        name=name,
        label=label,
        steps=steps,
        planned_steps=STEPS,
        make_model=make_model,
        batch=lambda step: language_batch(training_text(), step),
        learning_rate=lambda _: LEARNING_RATE,
        chunk_length=lambda _: chunk_length,
        finish=lambda model: {"validation_bits": validation_bits(model, chunk_length)},
    )


def make_model() -> LanguageModel:
    """The published architecture, from the published distributions."""
    return initialise_as_published(LanguageModel(MODEL), SEED)


@lru_cache
def text() -> Tensor:
    """The bytes of all topics, in the order of the package."""
    return torch.tensor(ByteTokenizer().encode("\n".join(topics.values())))


def training_text() -> Tensor:
    """All but the last tenth."""
    return text()[: len(text()) - validation_length()]


def validation_length() -> int:
    """Bytes of the last tenth."""
    return int(len(text()) * VALIDATION_SHARE)


def language_batch(data: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (1, T - 1), of window number `step`; the windows follow one another, round and round."""
    start = SEQUENCE_LENGTH * (step % (len(data) // SEQUENCE_LENGTH))
    window = data[None, start : start + SEQUENCE_LENGTH]
    return window[:, :-1], window[:, 1:]


def validation_bits(model: LanguageModel, chunk_length: int) -> float:
    """Mean over the validation windows, in bits per character, chunk by chunk as the model was trained."""
    data = text()[-validation_length() :]
    batches = [language_batch(data, window) for window in range(len(data) // SEQUENCE_LENGTH)]
    nats = sum(evaluate_loss(model, tokens, targets, chunk_length=chunk_length) for tokens, targets in batches)
    return nats * BITS / sum(targets.numel() for _, targets in batches)
