"""The contenders of the optimiser step: whole models of the same sizes, each trained as its authors or torch would.

Legend: B batch, T positions, C positions of a chunk, N chunks, S layers, D model width, H heads, K head width, M = K
features, F MLP width, V vocabulary, G = B * H.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import performer_pytorch, published_chunk
from slim_core.config import ModelConfig, OptimizerConfig
from slim_core.model import LanguageModel

PUBLISHED_VOCABULARY = 256
"""V of the published language models: byte values."""

PublishedState = tuple[Tensor, Tensor]
"""Sums of one layer: (G, M, K) and (G, M)."""


class PublishedLayer(nn.Module):
    """Attention and MLP, each normalised before it is added; biases on q, k and v; no output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.model_width
        self.num_heads = config.num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mlp_in, self.mlp_out = nn.Linear(width, config.mlp_width), nn.Linear(config.mlp_width, width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, x: Tensor, state: PublishedState, *, state_is_exit: bool
    ) -> tuple[Tensor, PublishedState, PublishedState]:
        """(B, C, D) and sums at the entry (or the exit) -> (B, C, D), sums at the entry, sums at the exit."""
        batch, length, width = x.shape
        q, k, v = (
            linear(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = q.square(), k.square()
        if state_is_exit:
            with torch.no_grad():
                added = (k.mT @ v).flatten(0, 1), k.sum(2).flatten(0, 1)
            state = (state[0] - added[0]).requires_grad_(), (state[1] - added[1]).requires_grad_()
        out, *exit_sums = published_chunk(q, k, v, *state)
        x = x + self.attention_norm(out.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp_norm(self.mlp_out(nn.functional.gelu(self.mlp_in(x))))
        return x, state, (exit_sums[0], exit_sums[1])


class PublishedModel(nn.Module):
    """The published architecture: token embedding and sinusoidal positions of half the width each, concatenated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(PUBLISHED_VOCABULARY, config.model_width // 2)
        self.layers = nn.ModuleList(PublishedLayer(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.model_width, PUBLISHED_VOCABULARY)

    def initial_states(self, batch: int) -> list[PublishedState]:
        """Zeros for every layer."""
        config = self.config
        sums = self.head.weight.new_zeros(batch * config.num_heads, config.head_width, config.head_width)
        return [(sums, sums[..., 0])] * config.num_layers

    def forward(
        self, tokens: Tensor, start: int, states: list[PublishedState], *, states_are_exit: bool = False
    ) -> tuple[Tensor, list[PublishedState], list[PublishedState]]:
        """(B, C) tokens from position `start` on -> logits (B, C, V), states at the entry, states at the exit."""
        embedded = self.embedding(tokens)
        positions = _positions(start, tokens.shape[1], embedded.shape[2]).to(embedded)
        x = torch.cat([embedded, positions.expand_as(embedded)], dim=2)
        entries, exits = [], []
        for layer, state in zip(self.layers, states, strict=True):
            x, entry, exit_state = layer(x, state, state_is_exit=states_are_exit)
            entries.append(entry)
            exits.append(exit_state)
        return self.head(x), entries, exits


def _positions(start: int, length: int, width: int) -> Tensor:
    """(C, width): sines, then cosines ("Attention Is All You Need", section 3.5)."""
    frequency = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(start, start + length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def published_step(model: PublishedModel, tokens: Tensor, targets: Tensor, chunk_length: int) -> float:
    """Loss and gradients by Algorithm 1 of the paper, (B, T) tokens; with one chunk, by plain back-propagation.

    Pass 1 runs the whole forward pass of every chunk, loss included; pass 2 walks back, recovers the states at each
    chunk's entry by subtraction and recomputes it.
    """
    length = tokens.shape[1]
    spans = [slice(start, min(start + chunk_length, length)) for start in range(0, length, chunk_length)]
    states = model.initial_states(tokens.shape[0])
    if len(spans) == 1:
        loss = _mean_loss(model(tokens, 0, states)[0], targets, targets.numel())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    total = 0.0
    with torch.no_grad():
        for span in spans:
            logits, _, states = model(tokens[:, span], span.start, states)
            total += _mean_loss(logits, targets[:, span], targets.numel()).item()
    exit_grads: list[Tensor] = []
    for span in reversed(spans):
        logits, entries, exits = model(tokens[:, span], span.start, states, states_are_exit=True)
        loss = _mean_loss(logits, targets[:, span], targets.numel())
        if exit_grads:
            torch.autograd.backward([loss, *_flat(exits)], [None, *exit_grads])
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        exit_grads = [x.grad for x in _flat(entries) if x.grad is not None]
        states = [(sums.detach(), key_sums.detach()) for sums, key_sums in entries]
    return total


def _mean_loss(logits: Tensor, targets: Tensor, normaliser: int) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / normaliser


def _flat(states: list[PublishedState]) -> list[Tensor]:
    return [x for state in states for x in state]


def performer_pytorch_model(config: ModelConfig, length: int, *, as_many_features: bool = False) -> nn.Module:
    """performer-pytorch's own `PerformerLM` of the same sizes; (B, T) tokens -> logits.

    Its defaults are FAVOR+ with K log K features, 266 for a head of 64: four times the work of squared features. With
    `as_many_features` it is the closest to ours in work: squares of random projections, with M = K. Either way it has
    an output projection, rotates queries and keys, and scans the sequence in 128 pieces.
    """
    features: dict[str, Any] = {}
    if as_many_features:
        features = {"nb_features": config.features_per_head, "generalized_attention": True, "kernel_fn": torch.square}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that there is no CUDA extension
        model: nn.Module = performer_pytorch().PerformerLM(
            num_tokens=config.vocab_size,
            max_seq_len=length,
            dim=config.model_width,
            depth=config.num_layers,
            heads=config.num_heads,
            dim_head=config.head_width,
            ff_mult=config.mlp_width // config.model_width,
            causal=True,
            **features,
        )
    return model


def autograd_step(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, targets: Tensor) -> float:
    """Loss and gradients of a model as everybody computes them."""
    loss = _mean_loss(logits_of(tokens), targets, targets.numel())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def checkpointed(model: LanguageModel) -> LanguageModel:
    """Our model with `torch.utils.checkpoint` around every block: its input is kept, all else recomputed."""
    for block in model.blocks:
        # Nothing in these blocks is random, so there is no state of a generator to keep.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def checkpointed_step(model: LanguageModel, tokens: Tensor, targets: Tensor) -> float:
    """Loss and gradients of the whole sequence of a `checkpointed` model by plain autograd."""
    chunk = model.forward_chunk(tokens, 0, model.initial_states(*tokens.shape))
    loss = model.loss(chunk.hidden, targets, scale=1 / targets.numel())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with our settings, in torch's fused form."""
    config = OptimizerConfig()
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.epsilon}
    return torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True, **options
    )
