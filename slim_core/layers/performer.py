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
from slim_core.layers.attention import Attention, Place, join_heads, split_heads
from slim_core.layers.documents import Segments, segments
from slim_core.layers.features import make_feature_map

BLOCK = 64
"""L. Within a block attention is a masked L x L product, across blocks it goes through the state: both are batched
matrix products, and no (C, M, K) tensor ever exists. 64 balances the two for head widths around 64."""

STATE_DTYPE = torch.float64
"""Of attention states between chunks and of their gradients. They are small, and `reverse` subtracts from them."""


GRID = 2.0**-31
"""What a chunk adds to a state is a multiple of this, unless it is computed in float64. Sums and differences of such
multiples are exact in float64 up to 2^22: `reverse` recovers the very states that pass 1 had, bit for bit, and
recomputes every chunk as it was. 2^-31 is far below the normaliser's epsilon, the scale of what matters."""


def causal_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, entry: Tensor, epsilon: float, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one chunk given the state at its entry ("SLiM", section 3.1).

    Args:
        q, k: features of queries and keys, (B, H, C, M), non-negative.
        v: values, (B, H, C, K).
        entry: state before the chunk, (B, H, M, K + 1), float64.
        epsilon: added to the normaliser.
        starts: (B, C) booleans, true where a document begins; None where none does.

    Returns:
        out: (B, H, C, K); exit: state after the chunk, shape and dtype of `entry`.

    Memory: saves q, k, v, out, the normaliser and nothing that grows faster than C; block states are recomputed.
    Sums are in float32 at least, whatever the precision of q, k and v.
    """
    out, exit_state = _BlockwiseAttention.apply(q, k, v, entry, epsilon, starts)  # type: ignore[no-untyped-call]
    return out, exit_state


def state_contribution(k: Tensor, v: Tensor) -> Tensor:
    """What a chunk adds to the state: g(K)^T [V, 1], (B, H, M, K + 1) in float64, bit for bit as the forward pass
    adds it."""
    return _sum_of_blocks(_contributions(_wide(_blocks(k)), _wide(_blocks(v)), None), STATE_DTYPE)


def exit_of(k: Tensor, v: Tensor, entry: Tensor, starts: Tensor | None) -> Tensor:
    """State after a chunk, from its keys' features, its values and its entry state alone."""
    if starts is None:
        return entry + state_contribution(k, v)
    k, v = _wide(_blocks(k)), _wide(_blocks(v))
    parts = segments(starts, k.shape[3], k.dtype)
    return _exit(_contributions(k, v, parts), entry, parts)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(x: Tensor) -> Tensor:
    """(B, H, C, X) -> (B, H, n, L, X), padded with zeros, which add nothing to any sum over keys."""
    length = x.shape[2]
    block = min(BLOCK, length)
    if length % block:
        x = nn.functional.pad(x, (0, 0, 0, block - length % block))
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


Pair = tuple[Tensor, Tensor]
"""The two parts of a state, or of a gradient of one: numerator (..., M, K) and denominator (..., M, 1). Apart, because
products of 64 columns run at 1.6 times the speed of products of 65."""


def _contributions(k: Tensor, v: Tensor, parts: Segments | None) -> Pair:
    """What each block adds to the state, (B, H, n, M, K) and (B, H, n, M, 1)."""
    if parts is not None:
        k = k * parts.reaches_exit
    return k.mT @ v, k.sum(3).unsqueeze(4)


def _halves(state: Tensor) -> Pair:
    return state[..., :-1], state[..., -1:]


def _entry_of_each_block(added: Tensor, entry: Tensor, parts: Segments | None) -> Tensor:
    """Exclusive running sum over blocks of one part of the state, starting from the chunk's entry state."""
    states = torch.empty_like(added)
    states[:, :, 0] = entry
    each, each_added = states.unbind(2), added.unbind(2)
    for block in range(1, len(each)):
        before = each[block - 1] if parts is None else each[block - 1] * parts.passes[:, :, block - 1]
        torch.add(before, each_added[block - 1], out=each[block])
    return states


def _sum_of_blocks(added: Pair, dtype: torch.dtype) -> Tensor:
    total = torch.cat([part.sum(2, dtype=dtype) for part in added], -1)
    return total if added[0].dtype == dtype else total.div_(GRID).round_().mul_(GRID)


def _exit(added: Pair, entry: Tensor, parts: Segments | None) -> Tensor:
    """Of the blocks' contributions those that no later border cuts off, and of the entry state likewise."""
    if parts is None:
        return entry + _sum_of_blocks(added, entry.dtype)
    passes = parts.passes.to(entry.dtype)
    uncut = passes.flip(2).cumprod(2).flip(2)  # by this block or a later one
    later_uncut = torch.cat([uncut[:, :, 1:], torch.ones_like(uncut[:, :, :1])], 2)
    return entry * uncut[:, :, 0] + _sum_of_blocks(
        (added[0] * later_uncut.to(added[0].dtype), added[1] * later_uncut.to(added[1].dtype)), entry.dtype
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place, over (B, H, n) matrices."""
    total.view(-1, *total.shape[3:]).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return total


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, entry: Tensor, epsilon: float, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length = v.shape[2]
        saved = _blocks(q), _blocks(k), _blocks(v)
        q, k, v = (_wide(x) for x in saved)
        parts = None if starts is None else segments(starts, q.shape[3], q.dtype)
        added = _contributions(k, v, parts)
        exit_state = _exit(added, entry, parts)
        entries = [_entry_of_each_block(part, half, parts) for part, half in zip(added, _halves(entry), strict=True)]
        del added
        scores = _masked(q @ k.mT, parts)
        seeing = q if parts is None else q * parts.sees_entry
        normaliser = (seeing @ entries[1]).add_(scores.sum(4, keepdim=True)).add_(epsilon)
        out = _add_product(seeing @ entries[0], scores, v).div_(normaliser).to(saved[2].dtype)
        ctx.save_for_backward(*saved, entry, out, normaliser, starts)
        return out.flatten(2, 3)[:, :, :length], exit_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_exit: Tensor) -> tuple[Tensor | None, ...]:
        *narrow, entry, out, normaliser, starts = ctx.saved_tensors
        q, k, v = (_wide(x) for x in narrow)
        length = grad_out.shape[2]
        parts = None if starts is None else segments(starts, q.shape[3], q.dtype)
        # A copy in the order of the blocks, once: each product below would make its own.
        grad_numerator = _blocks(grad_out).contiguous() / normaliser
        grad_denominator = (grad_numerator * out).sum(4, keepdim=True).neg_()

        grad_scores = _masked((grad_numerator @ v.mT).add_(grad_denominator), parts)
        grad_q, grad_k = grad_scores @ k, grad_scores.mT @ q
        del grad_scores
        numerators, denominators = (
            _entry_of_each_block(part, half, parts)
            for part, half in zip(_contributions(k, v, parts), _halves(entry), strict=True)
        )
        if parts is None:
            _add_product(grad_q, grad_numerator, numerators.mT).addcmul_(grad_denominator, denominators.mT)
        else:
            grad_q += parts.sees_entry * (grad_numerator @ numerators.mT + grad_denominator * denominators.mT)
        del numerators, denominators

        # A block's keys and values act on every later block and on the exit state: a running sum from the end.
        seeing = q if parts is None else q * parts.sees_entry
        grad_entries = seeing.mT @ grad_numerator, seeing.mT @ grad_denominator
        grad_entry = _grad_of_entry(grad_entries, grad_exit, parts) if ctx.needs_input_grad[3] else None
        grad_kv, grad_k_sum = (
            _grad_of_contributions(part, half, parts)
            for part, half in zip(grad_entries, _halves(grad_exit), strict=True)
        )
        del grad_entries, seeing
        reaching = k if parts is None else k * parts.reaches_exit
        if parts is None:
            _add_product(grad_k, v, grad_kv.mT).add_(grad_k_sum.mT)
        else:
            grad_k += parts.reaches_exit * (v @ grad_kv.mT + grad_k_sum.mT)
        grad_v = reaching @ grad_kv
        del grad_kv, reaching
        _add_product(grad_v, _masked(q @ k.mT, parts).mT, grad_numerator)

        def positions(x: Tensor) -> Tensor:
            return x.flatten(2, 3)[:, :, :length].to(out.dtype)

        return positions(grad_q), positions(grad_k), positions(grad_v), grad_entry, None, None


def _masked(scores: Tensor, parts: Segments | None) -> Tensor:
    """Zero above the diagonal, and between documents; in place."""
    scores.tril_()
    return scores if parts is None else scores.mul_(parts.same)


def _grad_of_entry(grad_entries: Pair, grad_exit: Tensor, parts: Segments | None) -> Tensor:
    if parts is None:
        return grad_exit + torch.cat([part.sum(2, dtype=grad_exit.dtype) for part in grad_entries], -1)
    uncut = parts.passes.to(grad_exit.dtype).cumprod(2)  # by this block or an earlier one
    earlier_uncut = torch.cat([torch.ones_like(uncut[:, :, :1]), uncut[:, :, :-1]], 2)
    through_entries = torch.cat([(part * earlier_uncut).sum(2) for part in grad_entries], -1)
    return grad_exit * uncut[:, :, -1] + through_entries


def _grad_of_contributions(grad_entries: Tensor, grad_exit: Tensor, parts: Segments | None) -> Tensor:
    grad_added = torch.empty_like(grad_entries)
    grad_added[:, :, -1] = grad_exit
    each, each_entry = grad_added.unbind(2), grad_entries.unbind(2)
    for block in range(len(each) - 2, -1, -1):
        later = each[block + 1] if parts is None else each[block + 1] * parts.passes[:, :, block + 1]
        torch.add(later, each_entry[block + 1], out=each[block])
    return grad_added


class PerformerAttention(Attention):
    """Multi-head causal linear attention over one chunk (SLiM, equations 1 to 5). A sum of a state runs backwards."""

    policies = ("keep", "reverse", "stride")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        self.features = make_feature_map(config, layer)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """State before position 0: zeros, (B, H, M, K + 1) in float64."""
        config = self.config
        shape = (batch, config.num_heads, config.features_per_head, config.head_width + 1)
        return torch.zeros(shape, dtype=STATE_DTYPE, device=self.query.weight.device)

    def _query(self, x: Tensor, place: Place) -> Tensor:
        (q,) = split_heads(self.query(x), self.config.num_heads, parts=1)
        features: Tensor = self.features(place.rotated(q.contiguous()), is_query=True)
        return features

    def _keys_and_values(self, x: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        k, v = split_heads(self.key_value(x), self.config.kv_heads, parts=2)
        features = self.features(place.rotated(k.contiguous()), is_query=False)
        # A copy of v: a view would keep keys and values as they came from the product, twice as much, until backward.
        return self._for_each_query_head(features), self._for_each_query_head(v.contiguous())

    def _for_each_query_head(self, x: Tensor) -> Tensor:
        """(B, G, C, X) -> (B, H, C, X): a head of keys and values again for each of its query heads."""
        shared = self.config.num_heads // self.config.kv_heads
        return x if shared == 1 else x.repeat_interleave(shared, 1)

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """State after the chunk x, (B, C, D), without its outputs: keys and values only."""
        return exit_of(*self._keys_and_values(x, place), entry, place.starts)

    def forward(
        self, x: Tensor, state: Tensor, place: Place, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the chunk x, (B, C, D).

        Args:
            state: state at the chunk's entry, or at its exit if `state_is_exit`: then the entry state is recovered by
                subtracting the chunk's own contribution (SLiM, Algorithm 1) and becomes a leaf of the graph. Not
                possible for a chunk in which a document begins.

        Returns:
            output (B, C, D), entry state, exit state; the states (B, H, M, K + 1) in float64.
        """
        q = self._query(x, place)
        k, v = self._keys_and_values(x, place)
        if state_is_exit:
            assert place.starts is None
            state = (state - state_contribution(k.detach(), v.detach())).requires_grad_(torch.is_grad_enabled())
        out, exit_state = causal_linear_attention(q, k, v, state, self.config.attention_epsilon, place.starts)
        out = join_heads(out)
        return (out if self.output is None else self.output(out)), state, exit_state
