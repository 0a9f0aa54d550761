"""How long a plan takes: its work at the machine's rate, and an overhead for every layer of every chunk.

    step seconds = (flops / rate + N * S * overhead) * factor of finished jobs

Good for ranking plans and for a first estimate; a running job knows better, from its own steps.
Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, N chunks.
"""

from __future__ import annotations

import math

from slim_core.config import LoraConfig, ModelConfig
from slim_core.planning.memory_model import BLOCK, Schedule, layer_matrices
from slim_core.planning.plan import Calibration, Workload

_BACKWARD = 2
"""Cost of backward in forwards: a product for each of its two operands."""


def step_flops(model: ModelConfig, tokens: int, num_chunks: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of one optimiser step over `tokens` positions in chunks: pass 1 and pass 2."""
    forward = _forward_flops(model)
    states_only = (num_chunks - 1) / num_chunks * _states_flops(model)
    adapters = 0.0 if lora is None else (1 + _BACKWARD) * _adapter_flops(model, lora) - _weight_gradient_flops(model)
    return tokens * ((1 + _BACKWARD) * forward + states_only + adapters)


def step_seconds(workload: Workload, schedule: Schedule, calibration: Calibration) -> float:
    """Predicted seconds of one optimiser step."""
    model, train = workload.model, workload.train
    num_chunks = math.ceil(train.sequence_length / schedule.chunk_length)
    micro_batches = math.ceil(train.batch_size / schedule.micro_batch_size)
    tokens = train.batch_size * train.sequence_length
    flops = step_flops(model, tokens, num_chunks, train.lora)
    if schedule.state_policy == "reverse" and num_chunks > 1:
        flops += tokens * model.num_layers * _contribution_flops(model)
    elif schedule.state_policy == "stride" and num_chunks > 1:
        flops += tokens * _states_flops(model)
    is_narrow = train.precision == "bfloat16"
    rate = calibration.bfloat16_flops_per_second if is_narrow else calibration.flops_per_second
    overhead = micro_batches * num_chunks * model.num_layers * calibration.overhead_seconds
    return (flops / rate + overhead) * calibration.time_factor


def _contribution_flops(model: ModelConfig) -> float:
    """Per position of one layer: adding to (or taking from) its state."""
    return 2.0 * model.num_heads * model.features_per_head * (model.head_width + 1)


def _matrix_numbers(model: ModelConfig) -> int:
    """In the matrices of one layer."""
    return sum(rows * columns for rows, columns in layer_matrices(model).values())


def _layer_flops(model: ModelConfig) -> float:
    """Per position, one layer, forward: matrices, attention within blocks and across them."""
    within_block = 2.0 * model.num_heads * BLOCK * (model.features_per_head + model.head_width + 1)
    return 2.0 * _matrix_numbers(model) + within_block + 2 * _contribution_flops(model)


def _forward_flops(model: ModelConfig) -> float:
    return model.num_layers * _layer_flops(model) + 2.0 * model.model_width * model.vocab_size


def _states_flops(model: ModelConfig) -> float:
    """Pass 1: all of every layer but the last, of which keys and values only."""
    last = 4.0 * model.model_width**2 + _contribution_flops(model)
    return (model.num_layers - 1) * _layer_flops(model) + last


def _adapter_flops(model: ModelConfig, lora: LoraConfig) -> float:
    """Per position and for all layers, forward."""
    shapes = layer_matrices(model)
    return 2.0 * model.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.targets)


def _weight_gradient_flops(model: ModelConfig) -> float:
    """Per position: what frozen matrices save in backward."""
    return 2.0 * (model.num_layers * _matrix_numbers(model) + model.model_width * model.vocab_size)
