"""How long a plan takes: its operations, the bytes it moves and its calls, each at the machine's rate.

    step seconds = (operations / rate + bytes / bandwidth + calls * overhead) * factor of finished jobs

Good for ranking plans and for a first estimate; a running job knows better, from its own steps.
Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, N chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slim_core.config import LoraConfig, ModelConfig, TrainConfig
from slim_core.planning.memory_model import BLOCK, FLOAT, HALF, Schedule, layer_matrices, num_trained, saved_sites
from slim_core.planning.plan import Calibration, Workload

_BACKWARD = 2
"""Cost of backward in forwards: a product for each of its two operands."""
_ATTENTION_COST = 2.0
"""Batched products of 64 x 64 run at about half the rate of large ones."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one optimiser step does."""

    flops: float
    """Operations of matrix products, those inside attention at their cost in large ones."""
    bytes: float
    """Read and written by everything that is no product of its own, and by products for their weights."""
    calls: float
    """Layers times chunks: what costs the same however short a chunk is."""


def step_seconds(workload: Workload, schedule: Schedule, calibration: Calibration) -> float:
    """Predicted seconds of one optimiser step."""
    work = step_work(workload, schedule)
    is_narrow = workload.train.precision == "bfloat16"
    rate = calibration.bfloat16_flops_per_second if is_narrow else calibration.flops_per_second
    seconds = work.flops / rate + work.bytes / calibration.bytes_per_second + work.calls * calibration.overhead_seconds
    return seconds * calibration.time_factor


def step_work(workload: Workload, schedule: Schedule) -> Work:
    """Of all micro-batches and the update."""
    model, train = workload.model, workload.train
    num_chunks = math.ceil(train.sequence_length / schedule.chunk_length)
    micro_batches = math.ceil(train.batch_size / schedule.micro_batch_size)
    tokens = train.batch_size * train.sequence_length
    again = (num_chunks - 1) / num_chunks  # the share of the sequence that pass 1 visits
    attention = _Attention(model)
    attention_flops = model.num_layers * attention.layer * (1 + _BACKWARD + again)
    if schedule.state_policy == "reverse":
        attention_flops += again * model.num_layers * attention.contribution
    flops = step_flops(model, tokens, num_chunks, train.lora) + (_ATTENTION_COST - 1) * tokens * attention_flops
    if schedule.state_policy == "stride":
        flops += again * tokens * _states_flops(model)
    saved = sum(count * width for count, width in saved_sites(model, train))
    chunks = micro_batches * num_chunks
    return Work(
        flops=flops,
        # Each saved number is written, read again, and so is its gradient; pass 1 writes and reads it.
        bytes=tokens * saved * (4 + 2 * again)
        + chunks * _weight_bytes(model, train, again)
        + _update_bytes(model, train),
        calls=chunks * (model.num_layers + 1.0),
    )


def step_flops(model: ModelConfig, tokens: int, num_chunks: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of one optimiser step over `tokens` positions in chunks: pass 1 and pass 2."""
    forward = _forward_flops(model)
    states_only = (num_chunks - 1) / num_chunks * _states_flops(model)
    adapters = 0.0 if lora is None else (1 + _BACKWARD) * _adapter_flops(model, lora) - _weight_gradient_flops(model)
    return tokens * ((1 + _BACKWARD) * forward + states_only + adapters)


class _Attention:
    """Operations per position of one layer's attention, forward, and of adding to (or taking from) its state."""

    def __init__(self, model: ModelConfig) -> None:
        h, m, k = model.num_heads, model.features_per_head, model.head_width
        self.contribution = 2.0 * h * m * (k + 1)
        self.layer = 2.0 * h * BLOCK * (m + k + 1) + 2 * self.contribution


def _layer_flops(model: ModelConfig) -> float:
    """Per position, one layer, forward."""
    return 2.0 * _matrix_numbers(model) + _Attention(model).layer


def _matrix_numbers(model: ModelConfig) -> int:
    """In the matrices of one layer."""
    return sum(rows * columns for rows, columns in layer_matrices(model).values())


def _forward_flops(model: ModelConfig) -> float:
    return model.num_layers * _layer_flops(model) + 2.0 * model.model_width * model.vocab_size


def _states_flops(model: ModelConfig) -> float:
    """Pass 1: all of every layer but the last, of which keys and values only."""
    last = 2.0 * 2 * model.model_width**2 + _Attention(model).contribution
    return (model.num_layers - 1) * _layer_flops(model) + last


def _adapter_flops(model: ModelConfig, lora: LoraConfig) -> float:
    """Per position and for all layers, forward."""
    shapes = layer_matrices(model)
    return 2.0 * model.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.targets)


def _weight_gradient_flops(model: ModelConfig) -> float:
    """Per position: what frozen matrices save in backward."""
    return 2.0 * (model.num_layers * _matrix_numbers(model) + model.model_width * model.vocab_size)


def _weight_bytes(model: ModelConfig, train: TrainConfig, again: float) -> float:
    """Moved for every chunk: matrices read by forward, backward and pass 1, their gradients read and written. In
    bfloat16 each reading makes a copy, and each gradient is made, widened and added."""
    numbers = model.num_layers * _matrix_numbers(model) + model.model_width * model.vocab_size
    trained = numbers if train.lora is None else num_trained(model, train)
    reading, adding = (FLOAT, 2 * FLOAT) if train.precision == "float32" else (FLOAT + 2 * HALF, 2 * HALF + 4 * FLOAT)
    return numbers * reading * (2 + again) + trained * adding


def _update_bytes(model: ModelConfig, train: TrainConfig) -> float:
    """Norm, clipping and zeroing of the gradient (4 numbers per weight), and the optimiser's own reads and writes."""
    own = {"adamw": 7, "sgd": 5, "adafactor": 16}[train.optimizer.name]
    return FLOAT * num_trained(model, train) * (4.0 + own)
