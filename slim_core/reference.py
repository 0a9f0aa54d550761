"""The oracle: the whole sequence at once, quadratic attention, plain autograd. Slow on purpose, and written apart
from the fast path: it takes the weights of a `LanguageModel` and nothing else from it.

Legend: B batch, T positions, D width, H heads, K head width, M features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slim_core.config import ModelConfig
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
    return functional.linear(_norm(model.final_norm, x, model.config), head)


def _norm(norm: Any, x: Tensor, config: ModelConfig) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    shift = 0 if config.norm_type == "rms" else x.mean(-1, keepdim=True)
    y = (x - shift) / ((x - shift).square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * norm.weight
    return y if config.norm_type == "rms" else torch.as_tensor(y + norm.bias)


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
    if config.scaled_embeddings and config.positions != "concatenated":
        x = x * math.sqrt(config.model_width)
    match config.positions:
        case "sinusoidal":
            return x + _sinusoids(positions, config.model_width).to(dtype)
        case "concatenated":
            return torch.cat([x, _sinusoids(positions, config.model_width // 2).to(dtype)], 2)
        case "learned":
            assert model.position is not None
            return x + model.position.weight[positions.long()]
        case "rotary" | "none":
            return x
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
        elif config.activation == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
            hidden = hidden / 2 * (1 + torch.tanh(inner))
        else:
            hidden = functional.gelu(hidden)
        return functional.linear(hidden, block.mlp_out.weight, block.mlp_out.bias)

    def attention(y: Tensor) -> Tensor:
        return _attention(block.attention, y, positions, visible)

    def attention_norm(y: Tensor) -> Tensor:
        return _norm(block.attention_norm, y, config)

    def mlp_norm(y: Tensor) -> Tensor:
        return _norm(block.mlp_norm, y, config)

    match config.norm:
        case "pre":
            x = x + attention(attention_norm(x))
            return x + mlp(mlp_norm(x))
        case "post":
            x = attention_norm(x + attention(x))
            return mlp_norm(x + mlp(x))
        case "branch":
            x = x + attention_norm(attention(x))
            return x + mlp_norm(mlp(x))


def _attention(attention: Any, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    config = attention.config
    batch, length, width = x.shape

    def heads(linear: Any, first: int, count: int) -> Tensor:
        """(B, count, T, K): heads from number `first` on of a linear layer, one after the other."""
        each = []
        for head in range(first, first + count):
            rows = slice(head * config.head_width, (head + 1) * config.head_width)
            y = x @ linear.weight[rows].T
            each.append(y if linear.bias is None else y + linear.bias[rows])
        return torch.stack(each, 1)

    shared = config.num_heads // config.kv_heads
    q = heads(attention.query, 0, config.num_heads)
    k = heads(attention.key_value, 0, config.kv_heads).repeat_interleave(shared, 1)
    v = heads(attention.key_value, config.kv_heads, config.kv_heads).repeat_interleave(shared, 1)
    if config.positions == "rotary":
        q, k = _rotate(q, positions, config), _rotate(k, positions, config)
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
        if attention.output.bias is not None:
            out = out + attention.output.bias
    return torch.as_tensor(out)


def _rotate(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Channels i and i + K / 2 as a complex number, times exp(i angle)."""
    half = x.shape[-1] // 2
    frequencies = [_frequency(channel, config) for channel in range(half)]
    angle = positions[:, None, :, None] * torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def _frequency(channel: int, config: ModelConfig) -> float:
    """Of rotary positions, radians per position, after scaling."""
    frequency = math.pow(config.rotary_base, -2 * channel / config.head_width)
    scaling = config.rotary_scaling
    if scaling is None:
        return frequency
    if scaling.name == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_positions / scaling.high_frequency_factor:
        return frequency
    if wavelength > scaling.original_positions / scaling.low_frequency_factor:
        return frequency / scaling.factor
    smooth = (scaling.original_positions / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


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
