"""How much memory a plan needs: one named term per place that holds it, derived from what the code saves for backward.

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. Terms count bytes per
position of a chunk (micro-batch b, chunk length C: b * C positions). The trainer's heap of tensors has no holes, and
what it keeps idle it gives up at the planned peak (`slim_core.tensor_heap`, docs/decisions); the smallest tensors alone
lie in glibc's, which has.

Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, L = 64 block.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning.matching import adapter_moments, layer_bytes
from slim_core.planning.plan import Calibration, MemoryBreakdown, StatePolicy, Workload
from slim_core.planning.shapes import (
    is_trained,
    layer_matrices,
    num_frozen,
    num_trained,
    projection_size,
    trained_matrices,
    update_groups,
)
from slim_core.planning.sites import (
    FLOAT,
    HALF,
    INT64,
    Site,
    attention_sites,
    head_sites,
    mlp_sites,
    number_bytes,
    saved_by_mlp,
    saved_in_blocks,
    saved_sites,
    score_bytes,
)
from slim_core.tensor_heap import THRESHOLD_BYTES

DOUBLE = 8
INT32 = 4
BLOCK = 64
"""Of `slim_core.layers.performer`."""

_MIB = 2**20
_HEAD_BLOCK_BYTES = 2 * _MIB
_HEAD_BLOCK_ROWS = 128
_PANEL_INNER, _PANEL_ROWS, _PANEL_COLUMNS, _PANEL_REST = 192, 800, 6450, 8192
"""Numbers in the packed panels of a matrix product."""
_KERNEL_BYTES = 6 * 256 * 1024
"""Of a product, with those for its two gradients."""
_KERNEL_BASE_BYTES = 6 * _MIB
_SAVING_BYTES = 4 * _MIB
"""While a checkpoint is written: what is read to be hashed, rows of adapters that are merged."""
_SAFETY_BYTES = 5 * _MIB
"""First-use buffers of the libraries, and what is small beside a chunk's tensors."""
_GRAPH_BYTES = _MIB // 4
"""Of a layer: the nodes of a chunk's graph and their Python objects, and the holes between them. Steps of models of 8
and of 30 layers grew outside the heap of tensors by 3.8 and 10.2 MiB."""
_HOLES = 0.95
"""Of saved tensors that are too small for the heap of tensors: holes in glibc's, as measured there for what comes and
goes between (docs/decisions/0003-allocator.md)."""
_SAFETY_FRACTION = 0.02
"""Of what a step holds for a while: page rounding, temporaries that no term names."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The knobs of a plan."""

    chunk_length: int
    state_policy: StatePolicy
    micro_batch_size: int


@dataclass(frozen=True, slots=True)
class _Way:
    """A model and a way to train it, the same as another one if all but the sequence length is."""

    model: ModelConfig
    but_length: tuple[Any, ...]
    train: TrainConfig = field(compare=False)


_but_length = operator.attrgetter(*(each.name for each in fields(TrainConfig) if each.name != "sequence_length"))


class _Terms:
    """What depends on the model and the way to train it alone. The planner looks at a hundred schedules and lengths for
    each plan, and this is most of the work of every one."""

    def __init__(self, way: _Way) -> None:
        model, train = way.model, way.train
        self.in_rows, self.in_blocks = saved_sites(model, train), saved_in_blocks(model, train)
        self.at_head = _bytes(head_sites(model, train), 1)
        self.saved_by_mlp = _bytes(saved_by_mlp(model, train), 1)
        self.into_mlp, self.in_activation = (_bytes(sites, 1) for sites in mlp_sites(model, train))
        self.frozen, self.trained = num_frozen(model, train), num_trained(model, train)
        self.parameters = FLOAT * (self.frozen + self.trained + projection_size(model))
        self.optimizer = optimizer_bytes(model, train)
        self.cast = _cast_bytes(model, train)
        self.kernels = _kernel_bytes(model, train)
        self.outside = max(update_bytes(model, train), _SAVING_BYTES)


@functools.lru_cache(maxsize=64)
def _terms(way: _Way) -> _Terms:
    return _Terms(way)


def predict_peak(workload: Workload, schedule: Schedule, calibration: Calibration) -> MemoryBreakdown:
    """Bytes of the trainer process at its peak: the largest of what the head and the last layer's MLP and attention
    hold while a chunk's graph is whole, the update of the largest matrix, and the writing of a checkpoint."""
    model, train = workload.model, workload.train
    if model.attention == "gated":
        raise ValueError("attention: there is no memory model of gated attention yet")
    chunk_length = min(schedule.chunk_length, train.sequence_length)
    num_chunks = math.ceil(train.sequence_length / chunk_length)
    batch = schedule.micro_batch_size
    block = min(BLOCK, chunk_length)
    padded = batch * math.ceil(chunk_length / block) * block
    chunk = _Chunk(batch, chunk_length, block, positions=batch * chunk_length, padded=padded)
    terms = _terms(_Way(model, _but_length(train), train))
    saved, holes = _saved_bytes(terms, chunk)
    logits = _head_bytes(model, train, min(chunk.positions, head_block_rows(model.vocab_size)), calibration.threads)

    states = state_bytes(model, train, schedule.state_policy, num_chunks, batch)
    tokens, before_tokens = _token_bytes(train, batch)
    at_head = terms.at_head * chunk.positions + logits
    in_layer = _layer_bytes(model, train, terms, chunk, calibration.threads)
    in_backward = saved + max(at_head, in_layer) + terms.cast
    outside = max(terms.outside, before_tokens) - states
    workspace = max(in_backward, outside) - saved - logits + tokens + terms.kernels
    if train.matching is not None:
        workspace = max(workspace, matching_bytes(model, train, calibration.threads) - states - saved - logits)
    return MemoryBreakdown(
        runtime=calibration.runtime_bytes,
        parameters=terms.parameters,
        gradients=FLOAT * terms.trained,
        optimizer=terms.optimizer,
        states=states,
        activations=saved,
        logits=logits,
        workspace=workspace,
        safety=_SAFETY_BYTES
        + _GRAPH_BYTES * model.num_layers
        + holes
        + int(_SAFETY_FRACTION * (states + saved + logits + workspace)),
    )


def matching_bytes(model: ModelConfig, train: TrainConfig, threads: int) -> int:
    """Of the phase of matching, in place of all that a step holds beside weights, gradients and optimiser."""
    length = train.matching_length
    buffers = product_bytes(length, model.model_width, model.mlp_in_width, threads)
    return adapter_moments(model, train) + layer_bytes(model, train, length) + buffers + sum(_token_bytes(train, 1))


class _Chunk(NamedTuple):
    """Of a micro-batch."""

    batch: int
    length: int
    block: int
    """Positions of a block of linear attention."""
    positions: int
    padded: int
    """The same in whole blocks."""


def _saved_bytes(terms: _Terms, chunk: _Chunk) -> tuple[int, int]:
    """What autograd saves, and the holes between what is small of it."""
    in_rows, in_blocks = terms.in_rows, terms.in_blocks
    saved = _bytes(in_rows, chunk.positions) + _bytes(in_blocks, chunk.padded)
    return saved, int(_HOLES * (_small_bytes(in_rows, chunk.positions) + _small_bytes(in_blocks, chunk.padded)))


def _layer_bytes(model: ModelConfig, train: TrainConfig, terms: _Terms, chunk: _Chunk, threads: int) -> int:
    """What backward of the last layer holds beside what is saved."""
    in_attention = _bytes(attention_sites(model, train, chunk.block), chunk.padded)
    in_attention -= terms.saved_by_mlp * chunk.positions
    if model.attention == "softmax":
        in_attention += score_bytes(model, train, chunk.batch, chunk.length)
    # Of SwiGLU the wider product is the one of the forward pass, when hardly less is saved.
    product = product_bytes(chunk.positions, model.model_width, model.mlp_in_width, threads)
    return max(in_attention, terms.into_mlp * chunk.positions + product, terms.in_activation * chunk.positions)


def head_block_rows(vocab_size: int) -> int:
    """Rows whose logits exist at a time (`slim_core.layers.head`): about 2 MiB of them, but enough for a product."""
    return max(_HEAD_BLOCK_ROWS, _HEAD_BLOCK_BYTES // (FLOAT * vocab_size))


def optimizer_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """State of the optimiser: two moments, one, or sums over rows and columns (`slim_core.optim`)."""
    trained = num_trained(model, train)
    match train.optimizer.name:
        case "adamw":
            return 2 * FLOAT * trained
        case "sgd":
            return FLOAT * trained if train.optimizer.momentum else 0
        case "adafactor":
            matrices = trained_matrices(model, train)
            vectors = trained - sum(rows * columns for rows, columns in matrices)
            return FLOAT * (vectors + sum(rows + columns for rows, columns in matrices))


def update_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """What the optimiser's step holds for a moment: Adafactor the update of a matrix while that of the one before is
    still there, the others nothing."""
    if train.optimizer.name != "adafactor":
        return 0
    sizes = [[0, *(rows * columns for rows, columns in group)] for group in update_groups(model, train)]
    return FLOAT * max(sum(pair) for group in sizes for pair in itertools.pairwise(group))


def _cast_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """In bfloat16: a copy of the weights, and a gradient as a product and once more in float32 to be added. The head
    keeps its copy meanwhile."""
    if train.precision == "float32":
        return 0
    head = model.vocab_size * model.model_width
    largest = max(head, *(rows * columns for rows, columns in layer_matrices(model).values()))
    added = max(rows * columns for rows, columns in trained_matrices(model, train))
    at_head = (2 * HALF + FLOAT) * head if train.lora is None else 0
    return max(HALF * largest, (HALF + FLOAT) * added, at_head)


def _head_bytes(model: ModelConfig, train: TrainConfig, rows: int, threads: int) -> int:
    """Of a block of rows: logits with the buffers of their product, or with their log-probabilities."""
    buffers = product_bytes(rows, model.model_width, model.vocab_size, threads)
    return number_bytes(train) * rows * model.vocab_size + max(buffers, FLOAT * rows * model.vocab_size)


def product_bytes(rows: int, inner: int, columns: int, threads: int) -> int:
    """What MKL holds during a matrix product, (rows, inner) by (inner, columns): panels of both operands, packed by
    each thread. Its limits were read off a processor with AVX-512; others pack less."""
    panel = min(inner, _PANEL_INNER) * (min(rows, _PANEL_ROWS) + min(columns, _PANEL_COLUMNS))
    return threads * FLOAT * (panel + _PANEL_REST)


def _kernel_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """In bfloat16: oneDNN makes code for every shape of a product and keeps it."""
    if train.precision == "float32":
        return 0
    shapes = {*layer_matrices(model).values(), (model.vocab_size, model.model_width)}
    if train.lora is not None:
        shapes |= set(trained_matrices(model, train))
    return _KERNEL_BASE_BYTES + 2 * _KERNEL_BYTES * len(shapes)  # the last chunk may have a length of its own


def _bytes(sites: list[Site], positions: int) -> int:
    return positions * sum(count * width for count, width in sites)


def _small_bytes(sites: list[Site], positions: int) -> int:
    """Of the tensors that are not blocks of the heap of tensors."""
    return max(0, _bytes([(count, width) for count, width in sites if positions * width < THRESHOLD_BYTES], positions))


def state_bytes(model: ModelConfig, train: TrainConfig, policy: StatePolicy, num_chunks: int, batch: int) -> int:
    """Attention states between chunks: those at a chunk's entry and exit and the gradients at its exit, of one layer
    also the gradient at its entry and one on the way; and what the policy keeps. Where documents begin, and with packed
    ones that may be in every chunk, `reverse` keeps the sets before them."""
    if policy == "prefix":
        return _prefix_bytes(model, train, num_chunks, batch)
    layer = batch * model.state_size
    state = model.num_layers * layer
    if num_chunks == 1:
        return DOUBLE * (2 * state + layer)
    between = DOUBLE * (3 * state + 2 * layer)
    match policy:
        case "keep":
            kept = FLOAT * (num_chunks - 1)
        case "reverse":
            kept = DOUBLE * (num_chunks - 1 if train.packing == "packed" else 1)  # the initial ones at least
        case "stride":
            stride = default_stride(num_chunks)
            kept = FLOAT * math.ceil(num_chunks / stride) + DOUBLE * stride
    return between + state * kept


def _prefix_bytes(model: ModelConfig, train: TrainConfig, num_chunks: int, batch: int) -> int:
    """Keys and values of the whole sequence in every layer; and their gradient in float32, which layers have that are
    not below all adapters. With one chunk that of the last layer alone: those below make theirs when the activations of
    layers above are gone."""
    layer = batch * train.sequence_length * 2 * model.kv_width
    layers = model.num_layers - (not is_trained(train, "key_value"))
    return layer * (number_bytes(train) * model.num_layers + FLOAT * min(layers, 1 if num_chunks == 1 else layers))


def default_stride(num_chunks: int) -> int:
    """Chunks between two kept sets of the policy `stride`, about sqrt(N), which needs the least memory."""
    return max(1, math.isqrt(num_chunks))


def _token_bytes(train: TrainConfig, batch: int) -> tuple[int, int]:
    """The micro-batch's tokens and targets, and where its documents begin and how far each position is from that; and
    what else exists while these distances are summed up."""
    positions = batch * (train.sequence_length + 1)
    match train.packing:
        case "continuous" | "single":
            return positions * 2 * INT32, 0  # continuous text without a mask needs half: two views of the same tokens
        case "packed":
            return positions * (3 * INT32 + 1), positions * (INT32 + INT64)
