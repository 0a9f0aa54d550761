"""The oracle: the whole sequence at once, quadratic attention, plain autograd. Slow on purpose, and written apart
from the fast path: it takes the weights of a `LanguageModel` and nothing else from it.

Legend: B batch, T positions, D width, H heads, K head width, M features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slim_core.layers.head import IGNORED
from slim_core.model import Block, LanguageModel


def reference_loss(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    *,
    document_starts: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean cross-entropy in nats over the targets of (B, T) that are not `IGNORED`; differentiable, O(T^2) memory."""
    logits = reference_logits(model, tokens, document_starts=document_starts)
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.long().flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )


def reference_logits(model: LanguageModel, tokens: Tensor, *, document_starts: Tensor | None = None) -> Tensor:
    """(B, T) tokens -> (B, T, V). Documents begin where `document_starts`, (B, T) booleans, is true."""
    starts = (
        torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        if document_starts is None
        else document_starts
    )
    positions = _positions(starts)
    document = starts.cumsum(1)
    visible = (document[:, None, :, None] == document[:, None, None, :]).tril()  # (B, 1, T, T)
    x = _embedding(model, tokens.long(), positions)
    for block in model.blocks:
        assert isinstance(block, Block)
        x = _block(block, x, positions, visible)
    head = model.embedding.weight if model.head is None else model.head.weight
    return functional.linear(model.final_norm(x), head)


def _positions(starts: Tensor) -> Tensor:
    """(B, T): one row and one token after the other."""
    positions = torch.zeros(starts.shape, dtype=torch.float64, device=starts.device)
    for row in range(starts.shape[0]):
        for t in range(1, starts.shape[1]):
            positions[row, t] = 0 if starts[row, t] else positions[row, t - 1] + 1
    return positions


def _embedding(model: LanguageModel, tokens: Tensor, positions: Tensor) -> Tensor:
    config = model.config
    x: Tensor = model.embedding.weight[tokens]
    dtype = x.dtype
    match config.positions:
        case "sinusoidal":
            return x * math.sqrt(config.model_width) + _sinusoids(positions, config.model_width).to(dtype)
        case "concatenated":
            return torch.cat([x, _sinusoids(positions, config.model_width // 2).to(dtype)], 2)
        case "learned":
            assert model.position is not None
            return x * math.sqrt(config.model_width) + model.position.weight[positions.long()]
        case "rotary" | "none":
            return x * math.sqrt(config.model_width)
    raise AssertionError(config.positions)


def _sinusoids(positions: Tensor, width: int) -> Tensor:
    table = torch.zeros(*positions.shape, width, dtype=torch.float64, device=positions.device)
    for channel in range(width // 2):
        angle = positions / 10_000 ** (2 * channel / width)
        table[..., channel] = torch.sin(angle)
        table[..., width // 2 + channel] = torch.cos(angle)
    return table


def _block(block: Block, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    config = block.attention.config

    def mlp(y: Tensor) -> Tensor:
        hidden = functional.linear(y, block.mlp_in.weight, block.mlp_in.bias)
        if config.activation == "swiglu":
            gate, up = hidden[..., : config.mlp_width], hidden[..., config.mlp_width :]
            hidden = gate * torch.sigmoid(gate) * up
        else:
            hidden = functional.gelu(hidden)
        return functional.linear(hidden, block.mlp_out.weight, block.mlp_out.bias)

    def attention(y: Tensor) -> Tensor:
        return _attention(block.attention, y, positions, visible)

    match config.norm:
        case "pre":
            x = x + attention(block.attention_norm(x))
            return x + mlp(block.mlp_norm(x))
        case "post":
            x = block.attention_norm(x + attention(x))
            return torch.as_tensor(block.mlp_norm(x + mlp(x)))
        case "branch":
            x = x + block.attention_norm(attention(x))
            return x + torch.as_tensor(block.mlp_norm(mlp(x)))


def _attention(attention: Any, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    config = attention.config
    batch, length, width = x.shape

    def heads(y: Tensor) -> Tensor:
        return y.view(batch, length, config.num_heads, config.head_width).transpose(1, 2)

    def weights_of(linear: Any, part: int = 0) -> Tensor:
        rows = slice(part * width, (part + 1) * width)
        y = x @ linear.weight[rows].T
        return torch.as_tensor(y if linear.bias is None else y + linear.bias[rows])

    q = heads(weights_of(attention.query))
    k = heads(weights_of(attention.key_value))
    v = heads(weights_of(attention.key_value, part=1))
    if config.positions == "rotary":
        q, k = _rotate(q, positions), _rotate(k, positions)
    match config.attention:
        case "performer":
            out = _performer(attention, q, k, v, visible)
        case "gated":
            out = _gated(attention, x, q, k, v, visible)
        case _:
            scores = (q @ k.mT / math.sqrt(config.head_width)).masked_fill(~visible, -math.inf)
            out = scores.softmax(-1) @ v
    out = out.transpose(1, 2).reshape(batch, length, width)
    if config.attention == "gated":
        gate = x @ attention.gate.weight.T
        out = out * gate * torch.sigmoid(gate)
    if attention.output is not None:
        out = out @ attention.output.weight.T
    return torch.as_tensor(out)


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Channels i and i + K / 2 as a complex number, times exp(i angle)."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([10_000 ** (-channel / half) for channel in range(half)], dtype=torch.float64)
    angle = positions[:, None, :, None] * frequencies.to(positions.device)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def _performer(attention: Any, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """out_t = sum_{s <= t} g(q_t).g(k_s) v_s / (sum_{s <= t} g(q_t).g(k_s) + epsilon), by the T x T matrix."""
    scores = attention.features(q, is_query=True) @ attention.features(k, is_query=False).mT
    scores = scores * visible
    return torch.as_tensor((scores @ v) / (scores.sum(-1, keepdim=True) + attention.config.attention_epsilon))


def _gated(attention: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """out_t = sum_{s <= t} (prod_{s < r <= t} a_r) q_t.k_s / sqrt(K) v_s, normalised by head."""
    gates = torch.sigmoid(x @ attention.decay.weight.T + attention.decay.bias) ** (1 / 16)  # (B, T, H)
    length = x.shape[1]
    # Decay from every s to t; from t on it is masked.
    row = torch.ones(x.shape[0], gates.shape[2], length, dtype=x.dtype, device=x.device)
    rows = [row]
    for t in range(1, length):
        row = torch.where(torch.arange(length, device=x.device) < t, row * gates[:, t, :, None], row)
        rows.append(row)
    out = (q @ k.mT / math.sqrt(q.shape[-1]) * torch.stack(rows, 2) * visible) @ v
    return torch.as_tensor(out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.head_norm)
