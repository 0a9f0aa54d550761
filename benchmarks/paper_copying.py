"""The copying task of "SLiM Performers" (section 4), at the settings of the published code.

A sequence is a zero and 255 random tokens, twice. The loss is that of the second half, which can be predicted from the
first and from nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper_runs import Run, initialise_as_published
from slim_core.config import ModelConfig
from slim_core.layers.head import IGNORED
from slim_core.model import LanguageModel
from slim_core.step import ChunkSpans, count_targets

STEPS = 15_000
SEQUENCE_LENGTH = 512
VOCABULARY = 256
SEED = 42
LEARNING_RATE = 1e-2
ACCURACY_EVERY = 20
MODEL = ModelConfig(
    num_layers=1,
    model_width=256,
    num_heads=4,
    mlp_width=1_024,
    vocab_size=VOCABULARY,
    output_projection=False,
    positions="concatenated",
    attention_bias=True,
    norm="pre",
)


def runs(steps: int | None) -> list[Run]:
    """Five variants: whole sequences, chunks, and chunks after a first half on whole sequences."""
    count = steps or STEPS
    half = (f"copying-{count}-half", count // 2)
    return [
        _run("copying-full", "full", count, None, 0, half),
        _run("copying-128", "C = 128", count, 128, 0, None),
        _run("copying-64", "C = 64", count, 64, 0, None),
        _run("copying-full-then-128", "full, then C = 128", count, 128, half[1], half),
        _run("copying-full-then-64", "full, then C = 64", count, 64, half[1], half),
    ]


def _run(
    name: str, label: str, steps: int, chunk_length: int | None, chunked_from: int, branch: tuple[str, int] | None
) -> Run:
    def chunk_at(step: int) -> int:
        return SEQUENCE_LENGTH if chunk_length is None or step < chunked_from else chunk_length

    return Run(
        name=name,
        label=label,
        steps=steps,
        planned_steps=STEPS,
        make_model=make_model,
        batch=copying_batch,
        learning_rate=lambda step: LEARNING_RATE * (1.0 if step < steps * 2 // 3 else 0.1),
        chunk_length=chunk_at,
        accuracy=accuracy,
        accuracy_every=min(ACCURACY_EVERY, steps),
        branch=branch,
    )


def make_model() -> LanguageModel:
    """The published architecture: no norm before the head. (Theirs has a bias in the head, ours has none.)"""
    model = LanguageModel(MODEL)
    model.final_norm = nn.Identity()
    return initialise_as_published(model, SEED)


def copying_sequence(step: int) -> Tensor:
    """(T,): zero, 255 tokens from 1 to 255, and both again; drawn from the seed and the step."""
    drawn = np.random.default_rng([SEED, step]).integers(1, VOCABULARY, SEQUENCE_LENGTH // 2 - 1)
    half = np.concatenate([[0], drawn])
    return torch.from_numpy(np.concatenate([half, half]))


def copying_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, (1, T - 1): token t + 1 from those up to t, with a loss in the second half only."""
    sequence = copying_sequence(step)[None]
    tokens, targets = sequence[:, :-1], sequence[:, 1:].clone()
    targets[:, : SEQUENCE_LENGTH // 2 - 1] = IGNORED
    return tokens, targets


@torch.no_grad()
def accuracy(model: LanguageModel, tokens: Tensor, targets: Tensor, chunk_length: int) -> float:
    """Share of targets whose token has the largest logit, chunk by chunk as the loss is computed."""
    states = model.initial_states(*tokens.shape)
    correct = 0
    for span in ChunkSpans(tokens.shape[1], chunk_length):
        chunk = model.forward_chunk(tokens[:, span], span.start, states)
        correct += int((model.logits(chunk.hidden).argmax(-1) == targets[:, span]).sum())
        states = chunk.exit_states
    return correct / count_targets(targets)
