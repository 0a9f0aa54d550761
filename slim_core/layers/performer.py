"""Causal linear attention, one chunk at a time, in blocks of 64 positions.

Legend: B batch, H heads, C positions of a chunk, L = 64 positions of a block, n = C / L blocks, K head width, M
features. The state of one head is the sum over the past of g(k_t) [v_t, 1]^T, (M, K + 1): numerator and denominator
together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slim_core.config import ModelConfig
from slim_core.layers.features import make_feature_map

BLOCK = 64
"""L. Within a block attention is a masked L x L product, across blocks it goes through the state: both are batched
matrix products, and no (C, M, K) tensor ever exists. 64 balances the two for head widths around 64."""

STATE_DTYPE = torch.float64
"""Of attention states between chunks and of their gradients. They are small, and `reverse` subtracts from them."""


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, entry: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Attention of one chunk given the state at its entry ("SLiM", section 3.1).

    Args:
        q, k: features of queries and keys, (B, H, C, M), non-negative.
        v: values, (B, H, C, K).
        entry: state before the chunk, (B, H, M, K + 1), float64.
        epsilon: added to the normaliser.

    Returns:
        out: (B, H, C, K); exit: state after the chunk, shape and dtype of `entry`.

    Memory: saves q, k, [v, 1], out, the normaliser and nothing that grows faster than C; block states are recomputed.
    """
    out, exit_state = _BlockwiseAttention.apply(q, k, v, entry, epsilon)  # type: ignore[no-untyped-call]
    return out, exit_state


def state_contribution(k: Tensor, v: Tensor) -> Tensor:
    """What a chunk adds to the state: g(K)^T [V, 1], (B, H, M, K + 1) in float64, bit for bit as the forward pass
    adds it."""
    k, v1 = _blocks(k), _blocks(_append_one(v))
    return (k.mT @ v1).sum(2, dtype=STATE_DTYPE)


def _append_one(v: Tensor) -> Tensor:
    """[V, 1]: (B, H, C, K) -> (B, H, C, K + 1), contiguous."""
    v1 = v.new_ones(*v.shape[:-1], v.shape[-1] + 1)
    v1[..., :-1] = v
    return v1


def _blocks(x: Tensor) -> Tensor:
    """(B, H, C, X) -> (B, H, n, L, X), padded with zeros, which add nothing to any sum over keys."""
    length = x.shape[2]
    block = min(BLOCK, length)
    if length % block:
        x = nn.functional.pad(x, (0, 0, 0, block - length % block))
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


def _entry_of_each_block(kv: Tensor, entry: Tensor) -> Tensor:
    """Exclusive running sum over blocks, starting from the chunk's entry state: (B, H, n, M, K + 1)."""
    states = torch.empty_like(kv)
    states[:, :, 0] = entry
    states[:, :, 1:] = kv[:, :, :-1]
    return states.cumsum_(2)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, entry: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        length, width = v.shape[2:]
        q, k, v1 = _blocks(q), _blocks(k), _blocks(_append_one(v))
        kv = k.mT @ v1
        exit_state = entry + kv.sum(2, dtype=entry.dtype)
        sums = q @ _entry_of_each_block(kv, entry)
        del kv
        sums += (q @ k.mT).tril_() @ v1
        normaliser = sums[..., width:] + epsilon
        out = sums[..., :width] / normaliser
        ctx.save_for_backward(q, k, v1, entry, out, normaliser)
        return out.flatten(2, 3)[:, :, :length], exit_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_exit: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v1, entry, out, normaliser = ctx.saved_tensors
        width = out.shape[-1]
        length = grad_out.shape[2]

        # Gradients of numerator and normaliser, whose quotient is out.
        grad_sums = torch.empty_like(v1)
        torch.div(_blocks(grad_out), normaliser, out=grad_sums[..., :width])
        torch.sum(grad_sums[..., :width] * out, -1, out=grad_sums[..., width]).neg_()

        grad_scores = (grad_sums @ v1.mT).tril_()
        grad_q = grad_scores @ k
        grad_k = grad_scores.mT @ q
        del grad_scores
        grad_q += grad_sums @ _entry_of_each_block(k.mT @ v1, entry).mT

        # A block's keys and values act on every later block and on the exit state: a running sum from the end.
        grad_states = q.mT @ grad_sums
        grad_entry = grad_exit + grad_states.sum(2, dtype=entry.dtype) if ctx.needs_input_grad[3] else None
        grad_kv = torch.empty_like(grad_states)
        grad_kv[:, :, -1] = grad_exit
        for block in range(grad_kv.shape[2] - 2, -1, -1):
            torch.add(grad_kv[:, :, block + 1], grad_states[:, :, block + 1], out=grad_kv[:, :, block])
        del grad_states
        grad_k += v1 @ grad_kv.mT
        grad_v = ((q @ k.mT).tril_().mT @ grad_sums[..., :width]).add_(k @ grad_kv[..., :width])

        def positions(x: Tensor) -> Tensor:
            return x.flatten(2, 3)[:, :, :length]

        return positions(grad_q), positions(grad_k), positions(grad_v), grad_entry, None


class PerformerAttention(nn.Module):
    """Multi-head causal linear attention over one chunk (SLiM, equations 1 to 5).

    The interface that every kind of attention offers to `slim_core.model.Block`: `initial_state`, `exit_state` and
    `forward`, which takes the state at the exit as well where a state can be run backwards.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.model_width, config.model_width, bias=False)
        # Apart from the queries, so that pass 1 of the last layer adds to the state what pass 2 subtracts, bit for bit.
        self.key_value = nn.Linear(config.model_width, 2 * config.model_width, bias=False)
        self.features = make_feature_map(config, layer)
        self.output = (
            nn.Linear(config.model_width, config.model_width, bias=False) if config.output_projection else None
        )

    def initial_state(self, batch: int) -> Tensor:
        """State before position 0: zeros, (B, H, M, K + 1) in float64."""
        config = self.config
        shape = (batch, config.num_heads, config.features_per_head, config.head_width + 1)
        return torch.zeros(shape, dtype=STATE_DTYPE, device=self.query.weight.device)

    def _heads(self, x: Tensor) -> list[Tensor]:
        """(B, C, X * D) -> X views (B, H, C, K)."""
        batch, length, width = x.shape
        parts = width // self.config.model_width
        return list(x.view(batch, length, parts, self.config.num_heads, -1).permute(2, 0, 3, 1, 4).unbind())

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.key_value(x))
        return self.features(k.contiguous(), is_query=False), v

    def exit_state(self, x: Tensor, entry: Tensor) -> Tensor:
        """State after the chunk x, (B, C, D), without its outputs: keys and values only."""
        return entry + state_contribution(*self._keys_and_values(x))

    def forward(self, x: Tensor, state: Tensor, *, state_is_exit: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the chunk x, (B, C, D).

        Args:
            state: state at the chunk's entry, or at its exit if `state_is_exit`: then the entry state is recovered by
                subtracting the chunk's own contribution (SLiM, Algorithm 1) and becomes a leaf of the graph.

        Returns:
            output (B, C, D), entry state, exit state; the states (B, H, M, K + 1) in float64.
        """
        batch, length, width = x.shape
        (q,) = self._heads(self.query(x))
        q = self.features(q.contiguous(), is_query=True)
        k, v = self._keys_and_values(x)
        if state_is_exit:
            state = (state - state_contribution(k.detach(), v.detach())).requires_grad_(torch.is_grad_enabled())
        out, exit_state = causal_linear_attention(q, k, v, state, self.config.attention_epsilon)
        out = out.transpose(1, 2).reshape(batch, length, width)
        return (out if self.output is None else self.output(out)), state, exit_state
