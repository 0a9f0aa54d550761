"""What every kind of attention offers to `slim_core.model`, and what they share: positions and heads.

Legend: B batch, H heads, G of keys and values, C positions of a chunk, D model width, K = D / H head width.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig, RotaryScalingConfig
from slim_core.layers.linear import Linear
from slim_core.planning.plan import StatePolicy


class Place(NamedTuple):
    """What a layer knows about a chunk beside its input and its state."""

    start: int
    """Absolute position of the chunk's first token."""
    starts: Tensor | None
    """(B, C) booleans, true where a document begins; None where none does."""
    positions: Tensor | None
    """(B, C) integers, distance from the start of the document; None for one document a row."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines, (..., C, K / 2), of rotary positions."""

    def rotated(self, x: Tensor) -> Tensor:
        """Queries or keys, (B, H, C, K), turned by their positions (Su et al., "RoFormer", 2021): channel i with
        channel i + K / 2."""
        if self.rotation is None:
            return x
        cosines, sines = self.rotation
        first, second = x.chunk(2, -1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class Attention(nn.Module):
    """Attention over one chunk, from a state that stands for all positions before it."""

    policies: ClassVar[tuple[StatePolicy, ...]]
    """Ways to get a chunk's entry state in pass 2; none if the whole sequence must be one chunk."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, bias = config.model_width, config.attention_bias
        self.query = Linear(width, width, bias=bias)
        # Apart from the queries, so that pass 1 of the last layer adds to the state what pass 2 subtracts, bit for bit.
        self.key_value = Linear(width, 2 * config.kv_width, bias=bias)
        self.output = Linear(width, width, bias=config.output_bias) if config.output_projection else None

    def initial_state(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """State before position 0 of sequences of `length` positions, computed in `dtype`."""
        raise NotImplementedError

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """State after the chunk x, (B, C, D), at the least cost."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: Tensor, place: Place, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the chunk x, (B, C, D).

        Args:
            state: state at the chunk's entry; or at its exit if `state_is_exit`, for layers of policy `reverse`.

        Returns:
            output (B, C, D), entry state, exit state.
        """
        raise NotImplementedError


def frequencies(width: int, base: float, device: torch.device) -> Tensor:
    """(width / 2) float64: base^(-2 i / width) ("Attention Is All You Need", section 3.5)."""
    channel = torch.arange(0, width, 2, dtype=torch.float64, device=device)
    frequency: Tensor = base ** (-channel / width)
    return frequency


def angles(positions: Tensor, frequency: Tensor) -> Tensor:
    """(..., width / 2): in float64, where position 10^6 still has all its digits."""
    return positions.to(torch.float64).unsqueeze(-1) * frequency


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(..., width): sines, then cosines."""
    angle = angles(positions, frequencies(width, 10_000, positions.device))
    return torch.cat([angle.sin().to(dtype), angle.cos().to(dtype)], dim=-1)


def rotation(
    positions: Tensor,
    head_width: int,
    dtype: torch.dtype,
    base: float = 10_000.0,
    scaling: RotaryScalingConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `Place.rotated`, of positions (C,) or (B, C)."""
    frequency = frequencies(head_width, base, positions.device)
    angle = angles(positions, frequency if scaling is None else scaled(frequency, scaling))
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)  # the same for all heads
    return angle.cos().to(dtype), angle.sin().to(dtype)


def scaled(frequency: Tensor, scaling: RotaryScalingConfig) -> Tensor:
    """Frequencies slowed down: all by the factor ("position interpolation", Chen et al., 2023); or those that turn
    rarely within the positions of the first training, as in Llama 3.1 (`_compute_llama3_parameters` of transformers).
    """
    if scaling.name == "linear":
        return frequency / scaling.factor
    turns = scaling.original_positions * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def split_heads(x: Tensor, num_heads: int, parts: int) -> list[Tensor]:
    """(B, C, parts * H * K) -> `parts` views (B, H, C, K); with the G heads of keys and values likewise."""
    batch, length, _ = x.shape
    return list(x.view(batch, length, parts, num_heads, -1).permute(2, 0, 3, 1, 4).unbind())


def join_heads(x: Tensor) -> Tensor:
    """(B, H, C, K) -> (B, C, D)."""
    return x.transpose(1, 2).flatten(2)
