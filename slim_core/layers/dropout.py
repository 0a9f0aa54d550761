"""Dropout whose masks are a function of seed, step, layer, site, sequence, absolute position and channel.

Neither the chunk, nor the micro-batch, nor how often a chunk is recomputed changes a mask, so the plan does not change
the gradient. Masks are drawn in blocks of 64 absolute positions, each from a generator of its own.

Legend: B batch, C positions of a chunk, D width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Dropout:
    """The masks of one micro-batch of one optimiser step."""

    rate: float
    """Share of channels set to zero."""
    seed: int
    step: int
    """Optimiser step, counted from 0."""
    first_row: int
    """Number of the micro-batch's first sequence in the whole batch."""

    def __call__(self, x: Tensor, start: int, layer: int, site: str) -> Tensor:
        """x, (B, C, D) at absolute positions from `start`, with channels dropped and the rest scaled up."""
        if self.rate == 0:
            return x
        return _Drop.apply(x, self._mask(x, start, layer, site), 1 / (1 - self.rate))  # type: ignore[no-untyped-call, no-any-return]

    def _mask(self, x: Tensor, start: int, layer: int, site: str) -> Tensor:
        """(B, C, D) booleans: what stays."""
        batch, length, width = x.shape
        first, last = start // _BLOCK, (start + length - 1) // _BLOCK
        drawn = torch.empty(batch, last - first + 1, _BLOCK, width, dtype=torch.bool)
        for row in range(batch):
            for block in range(first, last + 1):
                key = f"{self.seed}/{self.step}/{layer}/{site}/{self.first_row + row}/{block}".encode()
                seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
                drawn[row, block - first].bernoulli_(1 - self.rate, generator=torch.Generator().manual_seed(seed))
        skipped = start - first * _BLOCK
        mask = drawn.flatten(1, 2)[:, skipped : skipped + length]
        # A view would keep the whole blocks until backward, four times as much for a chunk of 16.
        return (mask.clone() if mask.numel() < drawn.numel() else mask).to(x.device)


NO_DROPOUT = Dropout(rate=0.0, seed=0, step=0, first_row=0)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return x.mul(mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return grad.mul(mask).mul_(ctx.scale), None, None
