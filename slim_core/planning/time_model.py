"""How long a plan takes: its work at the machine's rate, and an overhead for every layer of every chunk.

    step seconds = flops / rate + N * S * overhead

Good for ranking plans and for a first estimate; a running job knows better, from its own steps.
Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, N chunks.
"""

from __future__ import annotations

import math

from slim_core.config import ModelConfig
from slim_core.planning.memory_model import BLOCK, Schedule
from slim_core.planning.plan import Calibration, Workload

_BACKWARD = 2
"""Cost of backward in forwards: a product for each of its two operands."""


def step_flops(model: ModelConfig, tokens: int, num_chunks: int) -> float:
    """Floating-point operations of one optimiser step over `tokens` positions in chunks: pass 1 and pass 2."""
    forward = _forward_flops(model)
    states_only = (num_chunks - 1) / num_chunks * _states_flops(model)
    return tokens * ((1 + _BACKWARD) * forward + states_only)


def step_seconds(workload: Workload, schedule: Schedule, calibration: Calibration) -> float:
    """Predicted seconds of one optimiser step."""
    num_chunks = math.ceil(workload.sequence_length / schedule.chunk_length)
    micro_batches = math.ceil(workload.batch_size / schedule.micro_batch_size)
    tokens = workload.batch_size * workload.sequence_length
    flops = step_flops(workload.model, tokens, num_chunks)
    if schedule.state_policy == "reverse" and num_chunks > 1:
        flops += tokens * _contribution_flops(workload.model)
    elif schedule.state_policy == "stride" and num_chunks > 1:
        flops += tokens * _states_flops(workload.model)
    overhead = micro_batches * num_chunks * workload.model.num_layers * calibration.overhead_seconds
    return flops / calibration.flops_per_second + overhead


def _contribution_flops(model: ModelConfig) -> float:
    """Per position and for all layers: adding to (or taking from) the states."""
    return 2.0 * model.num_layers * model.num_heads * model.features_per_head * (model.head_width + 1)


def _layer_flops(model: ModelConfig) -> float:
    """Per position, one layer, forward: projections, MLP, attention in blocks."""
    d, h, m, k = model.model_width, model.num_heads, model.features_per_head, model.head_width
    projections = (4 if model.output_projection else 3) * d * d
    within_block = h * BLOCK * (m + k + 1)
    across_blocks = 2 * h * m * (k + 1)
    return 2.0 * (projections + d * (model.mlp_in_width + model.mlp_width) + within_block + across_blocks)


def _forward_flops(model: ModelConfig) -> float:
    return model.num_layers * _layer_flops(model) + 2.0 * model.model_width * model.vocab_size


def _states_flops(model: ModelConfig) -> float:
    """Pass 1: all of every layer but the last, of which keys and values only."""
    last = 2.0 * (2 * model.model_width**2 + model.num_heads * model.features_per_head * (model.head_width + 1))
    return (model.num_layers - 1) * _layer_flops(model) + last
