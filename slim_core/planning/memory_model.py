"""How much memory a plan needs: one named term per place that holds it, derived from what the code saves for backward.

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. Terms count bytes per
position of a chunk (micro-batch b, chunk length C: b * C positions). The trainer's heap of tensors has no holes, and
what it keeps idle it gives up at the planned peak (`slim_core.tensor_heap`, docs/decisions); the smallest tensors alone
lie in glibc's, which has.

Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, L = 64 block.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from slim_core.config import LoraConfig, ModelConfig, TrainConfig
from slim_core.planning.plan import Calibration, MemoryBreakdown, StatePolicy, Workload
from slim_core.tensor_heap import THRESHOLD_BYTES

HALF = 2
FLOAT = 4
DOUBLE = 8
INT64 = 8
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


def predict_peak(workload: Workload, schedule: Schedule, calibration: Calibration) -> MemoryBreakdown:
    """Bytes of the trainer process at its peak: the largest of what the head and the last layer's MLP and attention
    hold while a chunk's graph is whole, the update of the largest matrix, and the writing of a checkpoint."""
    model, train = workload.model, workload.train
    if model.attention != "performer":
        raise ValueError(f"attention: there is no memory model of {model.attention} attention yet")
    chunk_length = min(schedule.chunk_length, train.sequence_length)
    num_chunks = math.ceil(train.sequence_length / chunk_length)
    batch = schedule.micro_batch_size
    positions = batch * chunk_length
    block = min(BLOCK, chunk_length)
    padded = batch * math.ceil(chunk_length / block) * block

    in_rows, in_blocks = saved_sites(model, train), saved_in_blocks(model, train)
    saved = _bytes(in_rows, positions) + _bytes(in_blocks, padded)
    holes = int(_HOLES * (_small_bytes(in_rows, positions) + _small_bytes(in_blocks, padded)))
    rows = min(positions, head_block_rows(model.vocab_size))
    logits = _head_bytes(model, train, rows, calibration.threads)
    at_head = _bytes(head_sites(model, train), positions) + logits
    in_attention = _bytes(attention_sites(model, train, block), padded) - _bytes(_saved_by_mlp(model, train), positions)
    into_mlp, in_activation = (_bytes(sites, positions) for sites in mlp_sites(model, train))
    # Of SwiGLU the wider product is the one of the forward pass, when hardly less is saved.
    into_mlp += product_bytes(positions, model.model_width, model.mlp_in_width, calibration.threads)
    in_layer = max(in_attention, into_mlp, in_activation)

    frozen, trained = num_frozen(model, train), num_trained(model, train)
    parameters = FLOAT * (frozen + trained + _projection_size(model))
    gradients = FLOAT * trained
    optimizer = optimizer_bytes(model, train)
    states = state_bytes(model, schedule.state_policy, num_chunks, batch)
    in_backward = saved + max(at_head, in_layer) + _cast_bytes(model, train)
    workspace = max(in_backward, max(update_bytes(model, train), _SAVING_BYTES) - states) - saved - logits
    workspace += _token_bytes(train.sequence_length, batch) + _kernel_bytes(model, train)
    return MemoryBreakdown(
        runtime=calibration.runtime_bytes,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        states=states,
        activations=saved,
        logits=logits,
        workspace=workspace,
        safety=_SAFETY_BYTES + holes + int(_SAFETY_FRACTION * (states + saved + logits + workspace)),
    )


def head_block_rows(vocab_size: int) -> int:
    """Rows whose logits exist at a time (`slim_core.layers.head`): about 2 MiB of them, but enough for a product."""
    return max(_HEAD_BLOCK_ROWS, _HEAD_BLOCK_BYTES // (FLOAT * vocab_size))


def num_trained(model: ModelConfig, train: TrainConfig) -> int:
    """Numbers that have a gradient: all of the model's, or its adapters'."""
    if train.lora is None:
        return model.num_parameters
    shapes = layer_matrices(model)
    return model.num_layers * train.lora.rank * sum(sum(shapes[name]) for name in train.lora.targets)


def num_frozen(model: ModelConfig, train: TrainConfig) -> int:
    """Numbers that have none: the whole model beside its adapters."""
    return 0 if train.lora is None else model.num_parameters


def layer_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linear layers of a block by name, (outputs, inputs)."""
    d, f = model.model_width, model.mlp_width
    output = {"output": (d, d)} if model.output_projection else {}
    mlp = {"mlp_in": (model.mlp_in_width, d), "mlp_out": (d, f)}
    return {"query": (d, d), "key_value": (2 * d, d), **output, **mlp}


def check_adapters(model: ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError where a target is no linear layer of this model."""
    known = layer_matrices(model)
    for target in lora.targets:
        if target not in known:
            raise ValueError(f"targets: no linear layer {target!r} in this model; it has {', '.join(known)}")


def _trained_matrices(model: ModelConfig, train: TrainConfig) -> list[tuple[int, int]]:
    """Shapes of every matrix that is updated."""
    return [shape for group in _update_groups(model, train) for shape in group]


def _update_groups(model: ModelConfig, train: TrainConfig) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The same as the optimiser goes through them: matrices that decay, then embeddings (`slim_core.optim`)."""
    blocks = layer_matrices(model)
    if train.lora is not None:
        rank = train.lora.rank
        pairs = [blocks[name] for name in blocks if name in train.lora.targets]
        return [shape for rows, columns in pairs for shape in ((rank, columns), (rows, rank))] * model.num_layers, []
    head = [] if model.tied_embeddings else [(model.vocab_size, model.model_width)]
    positions = [] if model.max_positions is None else [(model.max_positions, model.model_width)]
    embeddings = [(model.vocab_size, model.embedding_width), *positions]
    return [*blocks.values()] * model.num_layers + head, embeddings


def optimizer_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """State of the optimiser: two moments, one, or sums over rows and columns (`slim_core.optim`)."""
    trained = num_trained(model, train)
    match train.optimizer.name:
        case "adamw":
            return 2 * FLOAT * trained
        case "sgd":
            return FLOAT * trained if train.optimizer.momentum else 0
        case "adafactor":
            matrices = _trained_matrices(model, train)
            vectors = trained - sum(rows * columns for rows, columns in matrices)
            return FLOAT * (vectors + sum(rows + columns for rows, columns in matrices))


def update_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """What the optimiser's step holds for a moment: Adafactor the update of a matrix while that of the one before is
    still there, the others nothing."""
    if train.optimizer.name != "adafactor":
        return 0
    sizes = [[0, *(rows * columns for rows, columns in group)] for group in _update_groups(model, train)]
    return FLOAT * max(sum(pair) for group in sizes for pair in itertools.pairwise(group))


def _cast_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """In bfloat16: a copy of the weights, and a gradient as a product and once more in float32 to be added. The head
    keeps its copy meanwhile."""
    if train.precision == "float32":
        return 0
    head = model.vocab_size * model.model_width
    largest = max(head, *(rows * columns for rows, columns in layer_matrices(model).values()))
    added = max(rows * columns for rows, columns in _trained_matrices(model, train))
    at_head = (2 * HALF + FLOAT) * head if train.lora is None else 0
    return max(HALF * largest, (HALF + FLOAT) * added, at_head)


Site = tuple[int, int]
"""Tensors of one width: how many, and bytes per position of each."""

_OF_ATTENTION = ("query", "key_value", "output")
_OF_MLP = ("mlp_in", "mlp_out")


def saved_sites(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What autograd saves of a chunk between forward and backward of the layers. The input of a matrix product is saved
    for the gradient of its weights, where they are trained."""
    d, number = model.model_width, _number_bytes(train)
    attention, mlp = _saved_by_attention(model, train), _saved_by_mlp(model, train)
    sites = [(count * model.num_layers, width) for count, width in (*attention, *mlp)]
    if train.lora is not None:  # below the first adapter nothing has a gradient but the states
        below = _saved_by_norm(model, train) if model.norm == "pre" else []
        if not _is_trained(train, *_OF_ATTENTION):
            below += _saved_by_feature_map(model, number)
        sites += [(-count, width) for count, width in below]
    sites.append((1, INT64))  # tokens
    if train.dropout and train.lora is None:
        sites.append((1, d))
    if model.positions == "rotary":
        sites.append((1, model.head_width * number))  # cosines and sines, for all layers
    return sites


def saved_in_blocks(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """The same for what lies in blocks of positions, the last one of a chunk padded."""
    number = _number_bytes(train)
    layer = [
        (2, model.num_heads * model.features_per_head * number),  # g(q), g(k)
        (2, model.model_width * number),  # v and the output
        (1, model.num_heads * FLOAT),  # the normaliser
    ]
    return [(count * model.num_layers, width) for count, width in layer]


def _saved_by_norm(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Input, mean and scale."""
    return [(1, model.model_width * _number_bytes(train)), (2, FLOAT)]


def _saved_by_attention(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Of one layer, with the norm and the residual sum, but not in blocks."""
    d, number = model.model_width, _number_bytes(train)
    rearranged = model.output_projection and _is_trained(train, "output")
    return [
        *_saved_by_norm(model, train),
        # Inputs of queries, keys and values, and of the projection.
        (_is_trained(train, "query", "key_value") + rearranged, d * number),
        *_saved_by_feature_map(model, number),
        *_saved_by_adapters(train, _OF_ATTENTION),
        *([(1, d)] if train.dropout else []),  # a mask of one byte
    ]


def _saved_by_mlp(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Of one layer, with the norm and the residual sum."""
    d, number = model.model_width, _number_bytes(train)
    f = model.mlp_width * number
    # Before and after the activation function; SwiGLU also saves the gate's, before its product with the other.
    product = (int(_is_trained(train, "mlp_out")), f)
    activation = [(1, f), product] if model.activation == "gelu" else [(1, 2 * f), (1, f), product]
    return [
        *_saved_by_norm(model, train),
        (int(_is_trained(train, "mlp_in")), d * number),
        *activation,
        *_saved_by_adapters(train, _OF_MLP),
        *([(1, d)] if train.dropout else []),
    ]


def _saved_by_adapters(train: TrainConfig, layers: tuple[str, ...]) -> list[Site]:
    """What lies between their two matrices."""
    if train.lora is None:
        return []
    return [(len(set(layers) & set(train.lora.targets)), train.lora.rank * _number_bytes(train))]


def head_sites(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What the head holds beside its logits: its input, and the gradient of it, which is made with the loss."""
    number, d = _number_bytes(train), model.model_width
    final_norm = [(1, d * number), (2, FLOAT)] if model.norm == "pre" else []
    return [(2, d * number), (1, INT64), *final_norm]


def _head_bytes(model: ModelConfig, train: TrainConfig, rows: int, threads: int) -> int:
    """Of a block of rows: logits with the buffers of their product, or with their log-probabilities."""
    buffers = product_bytes(rows, model.model_width, model.vocab_size, threads)
    return _number_bytes(train) * rows * model.vocab_size + max(buffers, FLOAT * rows * model.vocab_size)


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
        shapes |= set(_trained_matrices(model, train))
    return _KERNEL_BASE_BYTES + 2 * _KERNEL_BYTES * len(shapes)  # the last chunk may have a length of its own


def _number_bytes(train: TrainConfig) -> int:
    """Of an activation."""
    return FLOAT if train.precision == "float32" else HALF


def _is_trained(train: TrainConfig, *layers: str) -> bool:
    """Whether any of these linear layers needs its input for a gradient."""
    return train.lora is None or any(name in train.lora.targets for name in layers)


def _saved_by_feature_map(model: ModelConfig, number: int) -> list[Site]:
    """For queries and for keys."""
    match model.feature_map:
        case "squared" | "relu" | "elu1":
            return [(2, model.model_width * number)]  # its input, or relu's result
        case _:  # scaled input and exponential, in float32; one that was registered is taken to save as much
            return [(2, model.model_width * FLOAT), (2, model.num_heads * (model.features_per_head + 1) * FLOAT)]


def mlp_sites(model: ModelConfig, train: TrainConfig) -> tuple[list[Site], list[Site]]:
    """What backward holds beside the saved tensors in the last layer's MLP: before its activation function, and in
    it."""
    number = _number_bytes(train)
    f = model.mlp_width * number
    # The gradient of the residual stream, and that of the branch where it is another tensor.
    streams = (2 if train.dropout or model.norm == "branch" else 1, model.model_width * number)
    product = int(_is_trained(train, "mlp_out"))  # saved, and gone when the activation function has its turn
    with_adapter = train.lora is not None and product  # the gradient through the adapter and the one past it
    return (
        [streams, (2 if with_adapter else 1, f)],
        [streams, ((3 if model.activation == "swiglu" else 2) - product, f)],
    )


def attention_sites(model: ModelConfig, train: TrainConfig, block: int) -> list[Site]:
    """What backward holds in the last layer's attention, beside what is saved but for the MLP's."""
    number = _number_bytes(train)
    d, h, m = model.model_width, model.num_heads, model.features_per_head
    block_states = h * m * model.head_width // block
    sites = [
        (2, d * number),  # gradients of the residual stream and of attention's output
        (1, d * FLOAT),  # of the numerator
        (1, h * FLOAT),  # of the normaliser
        (2, h * m * FLOAT),  # of g(q) and g(k)
        # States of the blocks, before them and what they add; or the gradient of v and the blocks' scores.
        (1, max(2 * block_states, d + h * block) * FLOAT),
    ]
    if number != FLOAT:
        sites += [(2, h * m * FLOAT), (1, d * FLOAT)]  # g(q), g(k) and v once more, in float32
    return sites


def _bytes(sites: list[Site], positions: int) -> int:
    return positions * sum(count * width for count, width in sites)


def _small_bytes(sites: list[Site], positions: int) -> int:
    """Of the tensors that are not blocks of the heap of tensors."""
    return max(0, _bytes([(count, width) for count, width in sites if positions * width < THRESHOLD_BYTES], positions))


def state_bytes(model: ModelConfig, policy: StatePolicy, num_chunks: int, batch: int) -> int:
    """Attention states between chunks: those at a chunk's entry and exit and the gradients at its exit, of one layer
    also the gradient at its entry and one on the way; and what the policy keeps."""
    layer = batch * model.state_size
    state = model.num_layers * layer
    if num_chunks == 1:
        return DOUBLE * (2 * state + layer)
    between = DOUBLE * (3 * state + 2 * layer)
    match policy:
        case "keep":
            kept = FLOAT * (num_chunks - 1)
        case "reverse":
            kept = DOUBLE  # the initial ones
        case "stride":
            stride = default_stride(num_chunks)
            kept = FLOAT * math.ceil(num_chunks / stride) + DOUBLE * stride
    return between + state * kept


def default_stride(num_chunks: int) -> int:
    """Chunks between two kept sets of the policy `stride`, about sqrt(N), which needs the least memory."""
    return max(1, math.isqrt(num_chunks))


def _token_bytes(sequence_length: int, batch: int) -> int:
    """The micro-batch's token ids: the only thing that grows with the sequence."""
    return batch * (sequence_length + 1) * FLOAT


def _projection_size(model: ModelConfig) -> int:
    """Numbers of the FAVOR+ projections."""
    return model.num_layers * model.features_per_head * model.head_width if model.feature_map == "favor" else 0
