"""Gated (decayed) linear attention, one chunk at a time, in blocks of 64 positions.

The state of one head decays before each position by a gate that the input chooses, one number a head:

    state_t = a_t state_{t-1} + k_t v_t^T        out_t = q_t^T state_t / sqrt(K)

Constant gates would be RetNet (Sun et al., 2023), gates per channel GLA (Yang et al., ICML 2024). As in both, outputs
are normalised by head and gated. A decayed state cannot be run backwards without loss, so there is no `reverse`.

Legend: B batch, H heads, C positions of a chunk, L = 64 positions of a block, n = C / L blocks, D width, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig
from slim_core.layers.attention import Attention, Place, join_heads, split_heads
from slim_core.layers.documents import segments
from slim_core.layers.linear import Linear
from slim_core.layers.performer import BLOCK, STATE_DTYPE

_TEMPERATURE = 16
"""Divides the gates' logarithms, so that a fresh model remembers for dozens of positions (GLA, section 4.4)."""


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, entry: Tensor, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs, (B, H, C, K), and exit state of a chunk.

    Args:
        q, k, v: (B, H, C, K).
        log_gate: logarithms of the gates, (B, H, C), at most 0.
        entry: state before the chunk, (B, H, K, K) in float64.
        starts: (B, C) booleans, true where a document begins; None where none does.

    Plain autograd: exponents are differences of running sums within a block and never positive, so none overflows.
    """
    length = q.shape[2]
    block = min(BLOCK, length)
    q, k, v = (_blocks(x, block) for x in (q, k, v))
    log_decay = _blocks(log_gate.unsqueeze(3), block).cumsum(3)  # (B, H, n, L, 1)
    visible = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    parts = None if starts is None else segments(starts, block, q.dtype)
    if parts is not None:
        visible = visible & parts.same
    decay = (log_decay - log_decay.mT).masked_fill(~visible, -torch.inf).exp()
    within = (q @ k.mT * decay) @ v

    q = q * log_decay.exp()
    k = k * (log_decay[..., -1:, :] - log_decay).exp()
    passing = log_decay[..., -1:, :].exp()
    if parts is not None:
        q, k, passing = q * parts.sees_entry, k * parts.reaches_exit, passing * parts.passes
    kv = (k.mT @ v).to(entry.dtype)
    state, states = entry, []
    for number in range(kv.shape[2]):
        states.append(state)
        state = state * passing[:, :, number] + kv[:, :, number]
    out = within + q @ torch.stack(states, 2).to(q.dtype)
    return out.flatten(2, 3)[:, :, :length], state


def _blocks(x: Tensor, block: int) -> Tensor:
    """(B, H, C, X) -> (B, H, n, L, X). Padding with zeros adds no key and, as a logarithm, no decay."""
    x = nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


class GatedAttention(Attention):
    """Multi-head gated linear attention over one chunk. States decay: they do not run backwards."""

    policies = ("keep", "stride")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        width = config.model_width
        self.decay = Linear(width, config.num_heads)
        self.gate = Linear(width, width, bias=False)
        self.head_norm = nn.Parameter(torch.ones(config.head_width))

    def initial_state(self, batch: int, length: int, dtype: torch.dtype) -> Tensor:
        """State before position 0: zeros, (B, H, K, K) in float64."""
        width = self.config.head_width
        shape = (batch, self.config.num_heads, width, width)
        return torch.zeros(shape, dtype=STATE_DTYPE, device=self.query.weight.device)

    def _attend(self, x: Tensor, entry: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        heads = self.config.num_heads
        (q,) = split_heads(self.query(x), heads, parts=1)
        k, v = split_heads(self.key_value(x), heads, parts=2)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_gate = nn.functional.logsigmoid(self.decay(x).to(wide)).transpose(1, 2) / _TEMPERATURE
        q, k = place.rotated(q.to(wide)) * self.config.head_width**-0.5, place.rotated(k.to(wide))
        return gated_linear_attention(q, k, v.to(wide), log_gate, entry, place.starts)

    def exit_state(self, x: Tensor, entry: Tensor, place: Place) -> Tensor:
        """State after the chunk x, (B, C, D)."""
        return self._attend(x, entry, place)[1]

    def forward(
        self, x: Tensor, state: Tensor, place: Place, *, state_is_exit: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention over the chunk x, (B, C, D), from its entry state: output, entry state, exit state."""
        assert not state_is_exit
        out, exit_state = self._attend(x, state, place)
        out = nn.functional.rms_norm(out, out.shape[-1:], self.head_norm.to(out.dtype), eps=1e-6).to(x.dtype)
        out = join_heads(out) * nn.functional.silu(self.gate(x))
        return (out if self.output is None else self.output(out)), state, exit_state
