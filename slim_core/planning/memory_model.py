"""How much memory a plan needs: one named term per place that holds it, derived from what the code saves for backward.

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. Terms count numbers per
position of a chunk (micro-batch b, chunk length C: b * C positions). What the process holds beyond its live tensors
is the heap's waste, for the allocator settings that the trainer is started with (`worker.environment`, docs/decisions).

Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, L = 64 block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slim_core.config import ModelConfig
from slim_core.planning.plan import Calibration, MemoryBreakdown, StatePolicy, Workload

FLOAT = 4
DOUBLE = 8
BLOCK = 64
"""Of `slim_core.layers.performer`."""

_MIB = 2**20
_HEAD_BLOCK_BYTES = 2 * _MIB
_HEAD_BLOCK_ROWS = 128
_MAPPING_THRESHOLD = 4 * _MIB
"""Tensors from this size on are mapped one by one and waste nothing (`worker.environment`)."""
_HEAP_WASTE = 0.95
"""Holes in the heap, as a share of the live bytes of chunk-sized tensors below the threshold. Fitted to 24 random
models; of 40 others, drawn after the fit, 36 measured 0.90 to 1.00 of the prediction and two more, by up to 1.1 %."""
_SAFETY_FRACTION = 0.06
"""Of everything but the runtime and the waste: weight-sized buffers of the libraries, mapped tensors' page rounding."""
_SAFETY_BYTES = 20 * _MIB
"""First-use buffers of the libraries that a larger model than the warm-up's touches, and what hundreds of steps add to
the holes that a few leave: the demonstration's job grew by 8 MiB between its 6th and its 80th step."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The knobs of a plan."""

    chunk_length: int
    state_policy: StatePolicy
    micro_batch_size: int


def predict_peak(workload: Workload, schedule: Schedule, calibration: Calibration) -> MemoryBreakdown:
    """Bytes of the trainer process at its peak: during backward of the widest chunk, in its last layer or its head."""
    model = workload.model
    if model.attention != "performer":
        raise ValueError(f"attention: there is no memory model of {model.attention} attention yet")
    chunk_length = min(schedule.chunk_length, workload.sequence_length)
    num_chunks = math.ceil(workload.sequence_length / chunk_length)
    batch = schedule.micro_batch_size
    positions = batch * chunk_length

    saved = _tensors(saved_sites(model), positions)
    # Logits and log-probabilities of a block of rows; the gradient takes their place.
    logits = [(2, FLOAT * model.vocab_size * min(positions, head_block_rows(model.vocab_size)))]
    backward = max((_tensors(sites, positions) for sites in backward_sites(model)), key=_bytes)
    activations, at_head, in_layer = _bytes(saved), _bytes(logits), _bytes(backward)
    waste = _heap_waste([*saved, *logits, *backward])  # the heap keeps the holes of both

    weights = FLOAT * model.num_parameters
    parameters = weights + FLOAT * _projection_size(model)
    states = state_bytes(model, schedule.state_policy, num_chunks, batch)
    workspace = max(0, in_layer - at_head) + _token_bytes(workload, batch)
    live = parameters + 3 * weights + states + activations + at_head + workspace
    return MemoryBreakdown(
        runtime=calibration.runtime_bytes,
        parameters=parameters,
        gradients=weights,
        optimizer=2 * weights,
        states=states,
        activations=activations,
        logits=at_head,
        workspace=workspace,
        safety=int(waste + _SAFETY_FRACTION * live) + _SAFETY_BYTES,
    )


def head_block_rows(vocab_size: int) -> int:
    """Rows whose logits exist at a time (`slim_core.layers.head`): about 2 MiB of them, but enough for a product."""
    return max(_HEAD_BLOCK_ROWS, _HEAD_BLOCK_BYTES // (FLOAT * vocab_size))


Site = tuple[int, int]
"""Tensors of one width: how many, and numbers per position of each."""


def saved_sites(model: ModelConfig) -> list[Site]:
    """What the graph of one chunk holds between forward and backward."""
    d, h = model.model_width, model.num_heads
    features = h * model.features_per_head
    layer = [
        (4, d),  # inputs of attention and of the MLP, inputs of their norms
        (4, 1),  # mean and scale of two norms
        (2, features),  # g(q), g(k)
        (2, d),  # v, attention's output
        (1, h),  # its normaliser
        *_saved_by_mlp(model),
        *_saved_by_feature_map(model),
    ]
    if model.output_projection:
        layer.append((1, d))  # attention's output rearranged, input of the projection
    # Input of the head and its gradient, which is made with the loss; input of the final norm.
    head = [(3, d), (2, 1)] if model.norm == "pre" else [(2, d)]
    if model.positions == "rotary":
        head.append((1, model.head_width))  # cosines and sines, for all layers
    token_ids = [(4, 1)]  # tokens and targets, 64 bits each
    return [(count * model.num_layers, width) for count, width in layer] + head + token_ids


def _saved_by_mlp(model: ModelConfig) -> list[Site]:
    """Before and after the activation function; SwiGLU also saves the gate's, before its product with the other."""
    f = model.mlp_width
    return [(2, f)] if model.activation == "gelu" else [(1, 2 * f), (2, f)]


def _saved_by_feature_map(model: ModelConfig) -> list[Site]:
    """For queries and for keys."""
    match model.feature_map:
        case "squared" | "relu" | "elu1":
            return [(2, model.model_width)]  # its input, or relu's result
        case _:  # one that was registered is taken to save as much
            return [(2, model.model_width), (2, model.num_heads * (model.features_per_head + 1))]  # scaled input, exp


def backward_sites(model: ModelConfig) -> tuple[list[Site], list[Site]]:
    """What backward holds beside the saved tensors in the last layer, at the MLP and at attention."""
    d, h, f, m = model.model_width, model.num_heads, model.mlp_width, model.features_per_head
    swiglu = model.activation == "swiglu"
    # Gradients: residual stream; MLP's inner layers, when one saved copy is gone.
    mlp = [(2, d), (3 if swiglu else 1, f)]
    block_states = h * m * model.head_width // BLOCK
    attention = [
        (4, d),  # gradients of the residual stream, of attention's output, of the numerator and of v
        (1, h),  # of the normaliser
        (4, h * m),  # of g(q) and g(k), and two products on their way through the feature map
        (3, max(h * BLOCK, block_states)),  # scores of the blocks; states of the blocks and their gradients
        (-4 if swiglu else -2, f),  # the MLP's saved tensors are gone when attention's turn comes
        (-1, d),
    ]
    return mlp, attention


def _tensors(sites: list[Site], positions: int) -> list[tuple[int, int]]:
    """How many tensors, and bytes of each."""
    return [(count, FLOAT * positions * width) for count, width in sites]


def _bytes(tensors: list[tuple[int, int]]) -> int:
    return sum(count * size for count, size in tensors)


def _heap_waste(tensors: list[tuple[int, int]]) -> float:
    """Bytes of holes in the heap, at most.

    Tensors below the mapping threshold leave holes as they come and go. Into a hole that is large enough malloc puts a
    tensor that it would map otherwise, and at another time maps it beside the hole: of two such tensors at most.
    """
    mapped = [size for _, size in tensors if size >= _MAPPING_THRESHOLD]
    heap_bytes = max(0, _bytes([(count, size) for count, size in tensors if size < _MAPPING_THRESHOLD]))
    return _HEAP_WASTE * heap_bytes + min(heap_bytes, 2 * max(mapped, default=0))


def state_bytes(model: ModelConfig, policy: StatePolicy, num_chunks: int, batch: int) -> int:
    """Attention states between chunks: entry and exit with their gradients, and what the policy keeps."""
    state = model.num_layers * batch * model.state_size
    between = 5 * DOUBLE * state
    if num_chunks == 1:
        return between
    match policy:
        case "keep":
            kept = FLOAT * (num_chunks - 1)
        case "reverse":
            kept = 0
        case "stride":
            stride = default_stride(num_chunks)
            kept = FLOAT * math.ceil(num_chunks / stride) + DOUBLE * stride
    return between + state * kept


def default_stride(num_chunks: int) -> int:
    """Chunks between two kept sets of the policy `stride`, about sqrt(N), which needs the least memory."""
    return max(1, math.isqrt(num_chunks))


def _token_bytes(workload: Workload, batch: int) -> int:
    """The micro-batch's token ids: the only thing that grows with the sequence."""
    return batch * (workload.sequence_length + 1) * FLOAT


def _projection_size(model: ModelConfig) -> int:
    """Numbers of the FAVOR+ projections."""
    return model.num_layers * model.features_per_head * model.head_width if model.feature_map == "favor" else 0
