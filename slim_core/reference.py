"""The oracle: the whole sequence at once, quadratic attention, plain autograd. Slow on purpose, and written apart
from the fast path: it takes the weights of a `Performer` and nothing else from it.

Legend: B batch, T positions, D width, H heads, K head width, M features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from slim_core.model import IGNORED, Block, Performer


def reference_loss(model: Performer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets of (B, T) that are not `IGNORED`; differentiable, O(T^2) memory."""
    logits = reference_logits(model, tokens)
    return functional.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), ignore_index=IGNORED)


def reference_logits(model: Performer, tokens: Tensor) -> Tensor:
    """(B, T) tokens -> (B, T, V)."""
    width = model.config.model_width
    x = model.embedding.weight[tokens.long()] * math.sqrt(width) + _positions(tokens.shape[1], width).to(
        model.embedding.weight.dtype
    )
    for block in model.blocks:
        assert isinstance(block, Block)
        x = _block(block, x)
    return functional.linear(model.final_norm(x), model.head.weight)


def _positions(length: int, width: int) -> Tensor:
    table = torch.zeros(length, width, dtype=torch.float64)
    for channel in range(width // 2):
        angle = torch.arange(length, dtype=torch.float64) / 10_000 ** (2 * channel / width)
        table[:, channel] = torch.sin(angle)
        table[:, width // 2 + channel] = torch.cos(angle)
    return table


def _block(block: Block, x: Tensor) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        hidden = functional.linear(y, block.mlp_in.weight, block.mlp_in.bias)
        return functional.linear(functional.gelu(hidden), block.mlp_out.weight, block.mlp_out.bias)

    if block.pre_norm:
        x = x + _attention(block, block.attention_norm(x))
        return x + mlp(block.mlp_norm(x))
    x = block.attention_norm(x + _attention(block, x))
    return torch.as_tensor(block.mlp_norm(x + mlp(x)))


def _attention(block: Block, x: Tensor) -> Tensor:
    """out_t = sum_{s <= t} g(q_t).g(k_s) v_s / (sum_{s <= t} g(q_t).g(k_s) + epsilon), by the T x T matrix."""
    attention = block.attention
    config = attention.config
    batch, length, width = x.shape

    def heads(y: Tensor) -> Tensor:
        return y.view(batch, length, config.num_heads, config.head_width).transpose(1, 2)

    q = heads(x @ attention.query.weight.T)
    k = heads(x @ attention.key_value.weight[:width].T)
    v = heads(x @ attention.key_value.weight[width:].T)
    scores = attention.features(q, is_query=True) @ attention.features(k, is_query=False).mT
    scores = scores * torch.ones(length, length, dtype=torch.bool).tril()
    out = (scores @ v) / (scores.sum(-1, keepdim=True) + config.attention_epsilon)
    out = out.transpose(1, 2).reshape(batch, length, width)
    if attention.output is not None:
        out = out @ attention.output.weight.T
    return torch.as_tensor(out)
