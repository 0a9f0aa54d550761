"""The model: embedding, blocks, head. It knows layers of attention by their interface and never sees a whole sequence.

Legend: B batch, C positions of a chunk, D model width, S layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig
from slim_core.layers.performer import PerformerAttention

States = list[Tensor]
"""One state of attention per layer."""

IGNORED = -100
"""Target of a position that has no loss."""


class Chunk(NamedTuple):
    """One chunk after the forward pass."""

    hidden: Tensor
    """(B, C, D), what the head reads."""
    entry_states: States
    """Leaves of the graph; their gradients belong to the chunk before."""
    exit_states: States


class Block(nn.Module):
    """Attention and MLP with residual sums, normalised before or after each."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = PerformerAttention(config, layer)
        self.attention_norm = nn.LayerNorm(config.model_width)
        self.mlp_norm = nn.LayerNorm(config.model_width)
        self.mlp_in = nn.Linear(config.model_width, config.mlp_width)
        self.mlp_out = nn.Linear(config.mlp_width, config.model_width)

    def _attention_input(self, x: Tensor) -> Tensor:
        return self.attention_norm(x) if self.pre_norm else x

    def _mlp(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.mlp_out(nn.functional.gelu(self.mlp_in(x)))
        return hidden

    def forward(self, x: Tensor, state: Tensor, *, state_is_exit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, D) and a state -> (B, C, D), entry state, exit state."""
        attended, entry, exit_state = self.attention(self._attention_input(x), state, state_is_exit=state_is_exit)
        if self.pre_norm:
            x = x + attended
            x = x + self._mlp(self.mlp_norm(x))
        else:
            x = self.attention_norm(x + attended)
            x = self.mlp_norm(x + self._mlp(x))
        return x, entry, exit_state

    def exit_state(self, x: Tensor, entry: Tensor) -> Tensor:
        """The exit state alone: no query, output or MLP."""
        state: Tensor = self.attention.exit_state(self._attention_input(x), entry)
        return state


class Performer(nn.Module):
    """A causal language model whose every chunk is one function: (tokens, entry states) -> (hidden, exit states)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.model_width)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.model_width) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.model_width, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> Performer:
        """Draw all weights from `seed`; the same weights on every device and under every plan. Returns itself.

        Matrices: normal of variance 1 / D, those that write to the residual stream scaled by 1 / sqrt(2 S) (GPT-2).
        """
        generator = torch.Generator().manual_seed(seed)
        residual_scale = 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                continue  # biases start at 0 and norms at 1: already so, or set below
            std = 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("mlp_out.weight", "attention.output.weight")):
                std *= residual_scale
            elif name == "head.weight":
                std *= 0.1  # close to uniform predictions at the start
            drawn = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(drawn)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return self

    def initial_states(self, batch: int) -> States:
        """States before position 0."""
        return [block.attention.initial_state(batch) for block in self._blocks()]

    def forward_chunk(self, tokens: Tensor, start: int, states: States, *, states_are_exit: bool = False) -> Chunk:
        """One chunk through all layers.

        Args:
            tokens: (B, C) integers.
            start: absolute position of the chunk's first token.
            states: entry states, one per layer; or exit states if `states_are_exit`, from which each layer recovers its
                entry state by subtraction (policy `reverse`).
        """
        x = self._embed(tokens, start)
        entries: States = []
        exits: States = []
        for block, state in zip(self._blocks(), states, strict=True):
            x, entry, exit_state = block(x, state, state_is_exit=states_are_exit)
            entries.append(entry)
            exits.append(exit_state)
        return Chunk(self.final_norm(x), entries, exits)

    def advance(self, tokens: Tensor, start: int, states: States) -> States:
        """Exit states of a chunk from its entry states, at the least cost: the last layer computes keys and values
        only."""
        x = self._embed(tokens, start)
        *blocks, last = self._blocks()
        exits: States = []
        for block, state in zip(blocks, states, strict=False):
            x, _, exit_state = block(x, state)
            exits.append(exit_state)
        return [*exits, last.exit_state(x, states[-1])]

    def loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of cross-entropies in nats over the positions of (B, C) that are not `IGNORED`."""
        logits = self.head(hidden).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _blocks(self) -> Sequence[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        """Token embeddings times sqrt(D) plus sinusoidal absolute positions (Vaswani et al., section 3.5)."""
        width = self.config.model_width
        x: Tensor = self.embedding(tokens) * math.sqrt(width)
        return x + sinusoidal_positions(start, tokens.shape[1], width, x.dtype, x.device)


def sinusoidal_positions(start: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, width): sines, then cosines. Angles in float64, where position 10^6 still has all its digits."""
    position = torch.arange(start, start + length, dtype=torch.float64, device=device)
    frequency = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = position[:, None] * frequency
    return torch.cat([angle.sin().to(dtype), angle.cos().to(dtype)], dim=1)
