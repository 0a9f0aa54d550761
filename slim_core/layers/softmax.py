"""Softmax attention, one chunk at a time: exact, with keys and values of the whole sequence as its state.

The state of a layer is one buffer, filled in place by pass 1; every entry state of a chunk is a view of it (policy
`prefix`). Its `.grad` is a second buffer, in which the chunks of pass 2, last to first, collect the gradient of earlier
keys and values. Neither is part of autograd's graph. Attention itself runs in blocks of queries and keys with a
running log-sum-exp (Dao et al., "FlashAttention", NeurIPS 2022): no tensor of C x T numbers ever exists.

Legend: B batch, H heads, G heads of keys and values, R = H / G query heads that share one, T positions of the sequence,
C of a chunk, n of a block of queries, L of a block of keys, D width, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slim_core.config import ModelConfig
from slim_core.layers.attention import Attention, Place, split_heads

QUERIES, KEYS = 128, 256
"""n and L: scores that stay in the caches of a processor, in products that are large enough for its full speed."""
CUDA_QUERIES, CUDA_KEYS = 1024, 1024
"""The same where a call costs more than its arithmetic."""
MOST_KEYS = 1024
"""L where a chunk is shorter than n: as many scores, but no more keys than this (in bfloat16 they are widened)."""


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, start: int, positions: Tensor | None = None
) -> Tensor:
    """Causal softmax attention of one chunk over all positions so far, (B, C, H, K).

    Args:
        q: queries of the chunk, (B, H, C, K).
        k, v: its keys and values, (B, G, C, K), which `state` holds already; here for their gradients.
        state: keys and values, (2, B, G, T, K), of positions 0 to start + C - 1 at least; not changed.
        start: absolute position of the chunk's first token.
        positions: (B, C), distance from the start of the document; None for one document a row.

    Backward adds the gradient of the earlier keys and values to `state.grad`, made when the first chunk needs it, and
    gives k and v theirs with what later chunks have added: chunks must run backwards from last to first.

    Memory: saves q, the result and a number per query and head. Scores exist for a block of queries and keys at a time
    (two such tensors in backward). Sums are in float32 at least.
    """
    first = None if positions is None else torch.arange(start, start + q.shape[2], device=q.device) - positions
    out: Tensor = _PrefixAttention.apply(q, k, v, state, start, first)  # type: ignore[no-untyped-call]
    return out


class _Block(NamedTuple):
    """Queries and keys whose scores exist together."""

    keys: slice
    """Absolute positions."""
    hidden: Tensor | None
    """(n, L) or (B, 1, n, L) booleans: the key is later than the query, or of another document; None where none is."""


class _Tiles:
    """A chunk's attention, cut into blocks of queries, and for each of them into blocks of the keys that they see."""

    def __init__(self, length: int, start: int, first: Tensor | None, device: torch.device) -> None:
        most_queries, keys = (CUDA_QUERIES, CUDA_KEYS) if device.type == "cuda" else (QUERIES, KEYS)
        self._num_queries = min(length, most_queries)
        self._num_keys = max(keys, min(MOST_KEYS, most_queries * keys // self._num_queries))
        self._length, self._start, self._device = length, start, device
        self._first = first

    def queries(self) -> Iterator[slice]:
        """Of the chunk."""
        for begin in range(0, self._length, self._num_queries):
            yield slice(begin, min(begin + self._num_queries, self._length))

    def blocks(self, queries: slice) -> Iterator[_Block]:
        """The one with the queries' own keys comes first: there each query sees one key at least, its own."""
        begin, end = self._start + queries.start, self._start + queries.stop
        first = None if self._first is None else self._first[:, queries]
        lowest, highest = (0, 0) if first is None else (int(first.min()), int(first.max()))
        own = torch.arange(begin, end, device=self._device)
        yield self._block(own, slice(begin, end), first, later=True, earlier=highest > begin)
        for low in range(lowest, begin, self._num_keys):
            high = min(low + self._num_keys, begin)
            yield self._block(own, slice(low, high), first, later=False, earlier=highest > low)

    def _block(self, own: Tensor, keys: slice, first: Tensor | None, *, later: bool, earlier: bool) -> _Block:
        hidden = None
        if later or earlier:
            positions = torch.arange(keys.start, keys.stop, device=self._device)
            hidden = positions > own.unsqueeze(1)
            if earlier and first is not None:
                hidden = (hidden | (positions < first.unsqueeze(2))).unsqueeze(1)
        return _Block(keys, hidden)


def _hide(scores: Tensor, hidden: Tensor | None, value: float, batch: int) -> Tensor:
    """`value` in the place of hidden keys' scores, (B * G, R * n, L), in place."""
    if hidden is not None:
        scores.view(batch, -1, *hidden.shape[-2:]).masked_fill_(hidden, value)
    return scores


def _rows(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, H, n, X) -> (B * G, R * n, X): the queries that share keys are rows of one matrix."""
    batch, heads, length, width = x.shape
    return x.reshape(batch * kv_heads, heads // kv_heads * length, width).to(dtype)


def _attend(rows: Tensor, keys: Tensor, values: Tensor, blocks: Iterator[_Block], batch: int) -> tuple[Tensor, Tensor]:
    """Of one block of queries: its result, (B * G, R * n, K), and logarithms of the softmax's denominators.

    Of the sums so far the largest score is a common factor, and they are rescaled where a later block has a larger one.
    """

    def scores_of(block: _Block) -> Tensor:
        return _hide(rows @ keys[:, block.keys].to(rows.dtype).mT, block.hidden, -math.inf, batch)

    own = next(blocks)
    scores = scores_of(own)
    largest = scores.amax(2, keepdim=True)
    scores.sub_(largest).exp_()
    denominator = scores.sum(2, keepdim=True)
    numerator = scores @ values[:, own.keys].to(rows.dtype)
    for block in blocks:
        del scores  # before the next ones exist
        scores = scores_of(block)
        before, largest = largest, torch.maximum(largest, scores.amax(2, keepdim=True))
        scores.sub_(largest).exp_()
        shrunk = before.sub_(largest).exp_()
        denominator.mul_(shrunk).add_(scores.sum(2, keepdim=True))
        numerator.mul_(shrunk).baddbmm_(scores, values[:, block.keys].to(rows.dtype))
    return numerator.div_(denominator), denominator.log_().add_(largest)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,  # noqa: ARG004  # read from the state; here for its gradient
        state: Tensor,
        start: int,
        first: Tensor | None,
    ) -> Tensor:
        batch, heads, length, width = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = state.flatten(1, 2)
        tiles = _Tiles(length, start, first, q.device)
        out = q.new_empty(batch, length, heads, width)
        log_sums = q.new_empty(batch, heads, length, 1, dtype=wide)
        for part in tiles.queries():
            rows = _rows(q[:, :, part], k.shape[1], wide) * width**-0.5
            result, log_sum = _attend(rows, keys, values, tiles.blocks(part), batch)
            out[:, part] = result.view(batch, heads, -1, width).transpose(1, 2)
            log_sums[:, :, part] = log_sum.view(batch, heads, -1, 1)
        ctx.save_for_backward(q, out, log_sums)
        # Not as saved tensors: the state is filled in place, which autograd would take for a mistake.
        ctx.state, ctx.start, ctx.tiles = state, start, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, out, log_sums = ctx.saved_tensors
        state, start = ctx.state, ctx.start
        batch, heads, length, width = q.shape
        kv_heads, wide = state.shape[2], log_sums.dtype
        grad_q = torch.empty_like(q) if ctx.needs_input_grad[0] else None
        kv_grads = _gradient_of(state, wide) if ctx.needs_input_grad[1] else None
        for part in ctx.tiles.queries():
            rows, grad, result, log_sum = (
                _rows(x, kv_heads, wide)
                for x in (
                    q[:, :, part],
                    grad_out[:, part].transpose(1, 2),
                    out[:, part].transpose(1, 2),
                    log_sums[:, :, part],
                )
            )
            rows = rows * width**-0.5
            grad_rows = _add_gradients(rows, grad, result, log_sum, state, kv_grads, ctx.tiles.blocks(part))
            if grad_q is not None:
                grad_q[:, :, part] = grad_rows.mul_(width**-0.5).view(batch, heads, -1, width)
        if kv_grads is None:
            return grad_q, None, None, None, None, None
        own = (batch, kv_heads, length, width)
        grad_k, grad_v = (grads[:, start : start + length].view(own).to(q.dtype) for grads in kv_grads)
        return grad_q, grad_k, grad_v, None, None, None


def _add_gradients(
    rows: Tensor,
    grad: Tensor,
    result: Tensor,
    log_sum: Tensor,
    state: Tensor,
    kv_grads: Tensor | None,
    blocks: Iterator[_Block],
) -> Tensor:
    """Of one block of queries, (B * G, R * n, K): returns their gradient and adds that of keys and values."""
    keys, values = state.flatten(1, 2)
    mean_grad = (grad * result).sum(2, keepdim=True)
    grad_rows = torch.zeros_like(rows)
    for block in blocks:
        block_keys = keys[:, block.keys].to(rows.dtype)
        weights = _hide((rows @ block_keys.mT).sub_(log_sum).exp_(), block.hidden, 0, state.shape[1])
        grad_scores = (grad @ values[:, block.keys].to(rows.dtype).mT).sub_(mean_grad).mul_(weights)
        grad_rows.baddbmm_(grad_scores, block_keys)
        if kv_grads is not None:
            kv_grads[0][:, block.keys].baddbmm_(grad_scores.mT, rows)
            kv_grads[1][:, block.keys].baddbmm_(weights.mT, grad)
        del weights, grad_scores  # before the next ones exist
    return grad_rows


def _gradient_of(state: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, B * G, T, K): the state's `.grad`, zeros at first; as a sum over chunks in float32 at least."""
    if state.grad is None:
        state.grad_dtype = dtype
        state.grad = torch.zeros_like(state, dtype=dtype)
    return state.grad.flatten(1, 2)


class SoftmaxAttention(Attention):
    """Multi-head causal softmax attention over one chunk, with grouped heads of keys and values (Ainslie et al., "GQA",
    2023)."""

    policies = ("prefix",)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)

    def initial_state(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """Room for the keys and values of a sequence: (2, B, G, T, K) in the precision that the model computes in."""
        shape = (2, batch, self.config.kv_heads, length, self.config.head_width)
        return torch.empty(shape, dtype=dtype, device=self.query.weight.device)

    def _keys_and_values(self, x: Tensor, state: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Of the chunk, written to the state."""
        k, v = split_heads(self.key_value(x), self.config.kv_heads, parts=2)
        k = place.rotated(k)
        end = place.start + x.shape[1]
        if end > state.shape[3]:
            raise ValueError(f"length: the state has room for {state.shape[3]} positions, not for {end}")
        own = state.detach()[:, :, :, place.start : end]
        own[0], own[1] = k.detach(), v.detach()
        return k, v

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """The same state, with the keys and values of the chunk x, (B, C, D)."""
        self._keys_and_values(x, entry, place)
        return entry

    def forward(
        self, x: Tensor, state: Tensor, place: Place, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the chunk x, (B, C, D): output and, at entry and exit, the state that was given."""
        assert not state_is_exit
        (q,) = split_heads(self.query(x), self.config.num_heads, parts=1)
        k, v = self._keys_and_values(x, state, place)
        out = prefix_attention(place.rotated(q), k, v, state, place.start, place.positions).flatten(2)
        return (out if self.output is None else self.output(out)), state, state
