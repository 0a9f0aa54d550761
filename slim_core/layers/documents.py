"""Several documents in one sequence: attention never crosses a border, and states start afresh there.

Legend: B batch, T positions of the sequence, C of a chunk, L of a block, n = C / L blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Segments(NamedTuple):
    """What a border inside a chunk changes in blockwise attention."""

    same: Tensor
    """(B, 1, n, L, L) booleans: two positions of a block belong to one document."""
    sees_entry: Tensor
    """(B, 1, n, L, 1) zeros and ones: no border between the block's start and this position, itself included."""
    reaches_exit: Tensor
    """(B, 1, n, L, 1) zeros and ones: no border between this position and the block's end."""
    passes: Tensor
    """(B, 1, n, 1, 1) zeros and ones: no border in the block."""


def segments(starts: Tensor, block: int, dtype: torch.dtype) -> Segments:
    """Of a chunk whose documents begin where `starts`, (B, C) booleans, is true."""
    padding = -starts.shape[1] % block
    blocks = nn.functional.pad(starts, (0, padding)).view(starts.shape[0], 1, -1, block)
    number = blocks.cumsum(3)  # of borders in the block so far
    return Segments(
        same=number.unsqueeze(4) == number.unsqueeze(3),
        sees_entry=(number == 0).unsqueeze(4).to(dtype),
        reaches_exit=(number == number[..., -1:]).unsqueeze(4).to(dtype),
        passes=(number[..., -1] == 0)[..., None, None].to(dtype),
    )


def positions_in_documents(starts: Tensor) -> Tensor:
    """(B, T) int32: how far each position is from the start of its document, given (B, T) booleans."""
    indices = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device).expand_as(starts)
    return indices - torch.where(starts, indices, 0).cummax(1).values
