"""The contenders of the attention operator: causal linear attention as others compute it, and softmax attention.

All take features of queries and keys, (B, H, T, M), non-negative, and values, (B, H, T, K), and give (B, H, T, K).

Legend: B batch, H heads, G = B * H, T positions, L = 64 positions of a step, M features, K head width.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slim_core.layers.performer import causal_linear_attention

STEP = 64
"""L, positions whose outer products exist at the same time in the published algorithm."""

EPSILON = 1e-6
"""Of the normaliser, in every contender of linear attention."""


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`slim_core`, the whole sequence as one chunk."""
    batch, heads, _, features = q.shape
    entry = torch.zeros(batch, heads, features, v.shape[3] + 1, dtype=torch.float64)
    return causal_linear_attention(q, k, v, entry, EPSILON)[0]


def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The published algorithm, the whole sequence as one chunk."""
    sums = q.new_zeros(q.shape[0] * q.shape[1], q.shape[3], v.shape[3])
    return published_chunk(q, k, v, sums, sums[..., 0])[0]


def published_chunk(q: Tensor, k: Tensor, v: Tensor, sums: Tensor, key_sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk as "Sub-Linear Memory: How to Make Performers SLiM" computes it (section 3.1 and appendix), written
    from the paper: outer products of L positions at a time and their cumulative sum, for numerators (M, K) and
    denominators (M,) apart; backward walks from the end and recovers the sums by subtraction.

    Args:
        sums, key_sums: at the chunk's entry, (G, M, K) and (G, M).

    Returns:
        Attention (B, H, T, K), and the sums at the chunk's exit.
    """
    batch, heads, length, _ = q.shape

    def time_first(x: Tensor) -> Tensor:
        return x.permute(2, 0, 1, 3).reshape(length, batch * heads, -1)

    queries, keys, values = time_first(q), time_first(k), time_first(v)
    numerators, exit_sums = _Numerators.apply(queries, keys, values, sums)  # type: ignore[no-untyped-call]
    denominators, exit_key_sums = _Denominators.apply(queries, keys, key_sums)  # type: ignore[no-untyped-call]
    out = numerators / (denominators[..., None] + EPSILON)
    return out.view(length, batch, heads, -1).permute(1, 2, 0, 3), exit_sums, exit_key_sums


def _spans(length: int) -> list[slice]:
    return [slice(start, min(start + STEP, length)) for start in range(0, length, STEP)]


class _Numerators(torch.autograd.Function):
    """g(q_t) . sum_{s <= t} g(k_s) v_s^T: q, k (T, G, M), v (T, G, K), sums (G, M, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(v)
        for span in _spans(q.shape[0]):
            prefix = (k[span, :, :, None] * v[span, :, None, :]).cumsum(0).add_(sums)
            out[span] = torch.einsum("tgm,tgmk->tgk", q[span], prefix)
            sums = prefix[-1].clone()
        ctx.save_for_backward(q, k, v, sums)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor, ...]:
        q, k, v, sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for span in reversed(_spans(q.shape[0])):
            outer = k[span, :, :, None] * v[span, :, None, :]
            sums = sums - outer.sum(0)
            prefix = outer.cumsum(0).add_(sums)
            grad_q[span] = torch.einsum("tgk,tgmk->tgm", grad[span], prefix)
            # A key and a value act on their own position and all later ones: a cumulative sum in reversed time, whose
            # operands are reversed while they are small.
            suffix = (q[span].flip(0)[..., None] * grad[span].flip(0)[:, :, None, :]).cumsum(0).add_(grad_sums)
            grad_k[span] = torch.einsum("tgk,tgmk->tgm", v[span].flip(0), suffix).flip(0)
            grad_v[span] = torch.einsum("tgm,tgmk->tgk", k[span].flip(0), suffix).flip(0)
            grad_sums = suffix[-1].clone()
        return grad_q, grad_k, grad_v, grad_sums


class _Denominators(torch.autograd.Function):
    """g(q_t) . sum_{s <= t} g(k_s): q, k (T, G, M), key sums (G, M) -> (T, G)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape[:2])
        for span in _spans(q.shape[0]):
            prefix = k[span].cumsum(0).add_(sums)
            out[span] = (q[span] * prefix).sum(-1)
            sums = prefix[-1].clone()
        ctx.save_for_backward(q, k, sums)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_sums: Tensor) -> tuple[Tensor, ...]:
        q, k, sums = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
        for span in reversed(_spans(q.shape[0])):
            sums = sums - k[span].sum(0)
            grad_q[span] = grad[span, :, None] * k[span].cumsum(0).add_(sums)
            suffix = (grad[span, :, None] * q[span]).flip(0).cumsum(0).add_(grad_sums)
            grad_k[span] = suffix.flip(0)
            grad_sums = suffix[-1].clone()
        return grad_q, grad_k, grad_sums


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One position after the other ("Transformers are RNNs", section 3.4), O(1) memory beside inputs and outputs."""
    out: Tensor = _Recurrence.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


class _Recurrence(torch.autograd.Function):
    """State (G, M, K + 1): numerator and denominator together. Backward walks back and subtracts."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, width = v.shape
        queries, keys = (x.flatten(0, 1).transpose(0, 1).contiguous() for x in (q, k))
        values = nn.functional.pad(v, (0, 1), value=1.0).flatten(0, 1).transpose(0, 1).contiguous()
        sums = torch.empty_like(values)
        state = q.new_zeros(batch * heads, q.shape[3], width + 1)
        for t in range(length):
            state.baddbmm_(keys[t].unsqueeze(2), values[t].unsqueeze(1))
            torch.bmm(queries[t].unsqueeze(1), state, out=sums[t].unsqueeze(1))
        normaliser = sums[..., width:] + EPSILON
        out = sums[..., :width] / normaliser
        ctx.save_for_backward(queries, keys, values, out, normaliser, state)
        return out.transpose(0, 1).reshape(batch, heads, length, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values, out, normaliser, state = ctx.saved_tensors
        batch, heads, length, _ = grad.shape
        grad_ratio = grad.flatten(0, 1).transpose(0, 1) / normaliser
        grad_sums = torch.cat([grad_ratio, -(grad_ratio * out).sum(-1, keepdim=True)], dim=-1)
        grad_q, grad_k, grad_v = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        state, grad_state = state.clone(), torch.zeros_like(state)
        for t in range(length - 1, -1, -1):
            torch.bmm(state, grad_sums[t].unsqueeze(2), out=grad_q[t].unsqueeze(2))
            grad_state.baddbmm_(queries[t].unsqueeze(2), grad_sums[t].unsqueeze(1))
            torch.bmm(grad_state, values[t].unsqueeze(2), out=grad_k[t].unsqueeze(2))
            torch.bmm(keys[t].unsqueeze(1), grad_state, out=grad_v[t].unsqueeze(1))
            state.baddbmm_(keys[t].unsqueeze(2), values[t].unsqueeze(1), alpha=-1)

        def heads_first(x: Tensor) -> Tensor:
            return x.transpose(0, 1).reshape(batch, heads, length, -1)

        return heads_first(grad_q), heads_first(grad_k), heads_first(grad_v[..., :-1])


def performer_pytorch() -> Any:
    """The module of the package performer-pytorch; it warns about its own imports, which are not ours to mend."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return importlib.import_module("performer_pytorch.performer_pytorch")


def performer_pytorch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """performer-pytorch 1.1.4 without its CUDA extension, in its own 128 steps of T / 128 positions.

    Its epsilon is added to the sum of keys: q . (sum k + eps), a normaliser larger by eps times the sum over q.
    """
    out: Tensor = performer_pytorch().causal_linear_attention_noncuda(q, k, v, eps=EPSILON)
    return out


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as torch computes it on a CPU (flash): another function, the one that is being replaced."""
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@dataclass(frozen=True)
class Operator:
    """One contender: q, k, v -> out, and the largest T at which a call takes seconds and not minutes."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    longest: int


OPERATORS = (
    Operator("slimtune", ours, 32_768),
    Operator("published algorithm", published, 32_768),
    Operator("per-position recurrence", recurrence, 4_096),
    Operator("performer-pytorch", performer_pytorch_attention, 32_768),
    Operator("softmax SDPA", softmax, 16_384),
)
