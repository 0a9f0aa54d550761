"""Softmax attention of the whole sequence: the Transformer that the others are compared with.

Legend: B batch, H heads, T positions, D width, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig
from slim_core.layers.attention import Attention, Place, join_heads, split_heads


class SoftmaxAttention(Attention):
    """Multi-head causal softmax attention; one chunk must hold the whole sequence. Its state is empty."""

    policies = ()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)

    def initial_state(self, batch: int) -> Tensor:
        """An empty tensor."""
        return torch.zeros(batch, 0, device=self.query.weight.device)

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """Impossible without keeping keys and values."""
        raise ValueError("softmax attention needs the whole sequence in one chunk")

    def forward(
        self, x: Tensor, state: Tensor, place: Place, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the sequence x, (B, T, D): output and twice the empty state."""
        if place.start or state_is_exit:
            raise ValueError("softmax attention needs the whole sequence in one chunk")
        heads = self.config.num_heads
        (q,) = split_heads(self.query(x), heads, parts=1)
        k, v = split_heads(self.key_value(x), heads, parts=2)
        mask = None
        if place.starts is not None:
            document = place.starts.cumsum(1)
            mask = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(
            place.rotated(q), place.rotated(k), v, attn_mask=mask, is_causal=mask is None
        )
        out = join_heads(out)
        return (out if self.output is None else self.output(out)), state, state
