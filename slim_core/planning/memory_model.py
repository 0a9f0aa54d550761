"""How much memory a plan needs: one named term per place that holds it, derived from what the code saves for backward.

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. Terms count bytes per
position of a chunk (micro-batch b, chunk length C: b * C positions). What the process holds beyond its live tensors
is the heap's waste, for the allocator settings that the trainer is started with (`worker.environment`, docs/decisions).

Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, L = 64 block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slim_core.config import LoraConfig, ModelConfig, TrainConfig
from slim_core.planning.plan import Calibration, MemoryBreakdown, StatePolicy, Workload

HALF = 2
FLOAT = 4
DOUBLE = 8
INT64 = 8
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
    """Bytes of the trainer process at its peak: during backward of the widest chunk, in its last layer or its head, or
    during the update of its largest matrix."""
    model, train = workload.model, workload.train
    if model.attention != "performer":
        raise ValueError(f"attention: there is no memory model of {model.attention} attention yet")
    chunk_length = min(schedule.chunk_length, train.sequence_length)
    num_chunks = math.ceil(train.sequence_length / chunk_length)
    batch = schedule.micro_batch_size
    positions = batch * chunk_length

    saved = _tensors(saved_sites(model, train), positions)
    # Logits and log-probabilities of a block of rows; the gradient takes their place.
    logits = [(2, FLOAT * model.vocab_size * min(positions, head_block_rows(model.vocab_size)))]
    backward = max((_tensors(sites, positions) for sites in backward_sites(model, train)), key=_bytes)
    activations, at_head, in_layer = _bytes(saved), _bytes(logits), _bytes(backward)
    waste = _heap_waste([*saved, *logits, *backward])  # the heap keeps the holes of both

    frozen, trained = num_frozen(model, train), num_trained(model, train)
    parameters = FLOAT * (frozen + trained + _projection_size(model))
    gradients = FLOAT * trained
    optimizer = optimizer_bytes(model, train)
    states = state_bytes(model, schedule.state_policy, num_chunks, batch)
    in_backward = activations + at_head + max(0, in_layer - at_head) + _cast_bytes(model, train)
    # The heap keeps what lay in it; larger tensors are gone when the weights are updated.
    in_update = _heap_bytes([*saved, *logits, *backward]) + _update_bytes(model, train)
    workspace = max(in_backward, in_update) - activations - at_head
    workspace += _token_bytes(train.sequence_length, batch)
    live = parameters + gradients + optimizer + states + activations + at_head + workspace
    return MemoryBreakdown(
        runtime=calibration.runtime_bytes,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        states=states,
        activations=activations,
        logits=at_head,
        workspace=workspace,
        safety=int(waste + _SAFETY_FRACTION * live) + _SAFETY_BYTES,
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
    shapes = {"query": (d, d), "key_value": (2 * d, d), "mlp_in": (model.mlp_in_width, d), "mlp_out": (d, f)}
    return shapes | ({"output": (d, d)} if model.output_projection else {})


def check_adapters(model: ModelConfig, lora: LoraConfig) -> None:
    """Raises ValueError where a target is no linear layer of this model."""
    known = layer_matrices(model)
    for target in lora.targets:
        if target not in known:
            raise ValueError(f"targets: no linear layer {target!r} in this model; it has {', '.join(known)}")


def _trained_matrices(model: ModelConfig, train: TrainConfig) -> list[tuple[int, int]]:
    """Shapes of every matrix that is updated."""
    blocks = layer_matrices(model)
    if train.lora is not None:
        rank = train.lora.rank
        pairs = [blocks[name] for name in train.lora.targets]
        return [shape for rows, columns in pairs for shape in ((rank, columns), (rows, rank))] * model.num_layers
    ends = [(model.vocab_size, model.embedding_width)]
    if not model.tied_embeddings:
        ends.append((model.vocab_size, model.model_width))
    if model.max_positions is not None:
        ends.append((model.max_positions, model.model_width))
    return [*blocks.values()] * model.num_layers + ends


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


def _update_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """What the optimiser's step holds for a moment: Adafactor the update of one matrix, the others nothing."""
    if train.optimizer.name != "adafactor":
        return 0
    return FLOAT * max(rows * columns for rows, columns in _trained_matrices(model, train))


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


def saved_sites(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What the graph of one chunk holds between forward and backward. The input of a matrix product is saved for the
    gradient of its weights, where they are trained."""
    number = _number_bytes(train)
    d, h = model.model_width, model.num_heads
    features = h * model.features_per_head
    layer = [
        (2 + _is_trained(train, "query", "key_value") + _is_trained(train, "mlp_in"), d * number),
        # ^ inputs of two norms, of attention and of the MLP
        (4, FLOAT),  # mean and scale of two norms
        (2, features * number),  # g(q), g(k)
        (2, d * number),  # v, attention's output
        (1, h * FLOAT),  # its normaliser
        *_saved_by_mlp(model, train),
        *_saved_by_feature_map(model, number),
    ]
    if model.output_projection and _is_trained(train, "output"):
        layer.append((1, d * number))  # attention's output rearranged, input of the projection
    if train.lora is not None:
        layer.append((len(train.lora.targets), train.lora.rank * number))
    # Input of the head and its gradient, which is made with the loss; input of the final norm.
    ends = [(3, d * number), (2, FLOAT)] if model.norm == "pre" else [(2, d * number)]
    if train.dropout:
        layer.append((2, d))  # masks of one byte
        if train.lora is None:
            ends.append((1, d))
    if model.positions == "rotary":
        ends.append((1, model.head_width * number))  # cosines and sines, for all layers
    if train.lora is not None and model.norm == "pre":
        ends += [(-1, d * number), (-2, FLOAT)]  # nothing below the first layer's norm is trained
    ends.append((2, INT64))  # tokens and targets
    return [(count * model.num_layers, width) for count, width in layer] + ends


def _number_bytes(train: TrainConfig) -> int:
    """Of an activation."""
    return FLOAT if train.precision == "float32" else HALF


def _is_trained(train: TrainConfig, *layers: str) -> bool:
    """Whether any of these linear layers needs its input for a gradient."""
    return train.lora is None or any(name in train.lora.targets for name in layers)


def _saved_by_mlp(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Before and after the activation function; SwiGLU also saves the gate's, before its product with the other."""
    f = model.mlp_width * _number_bytes(train)
    product = 1 if _is_trained(train, "mlp_out") else 0
    return [(1 + product, f)] if model.activation == "gelu" else [(1, 2 * f), (1 + product, f)]


def _saved_by_feature_map(model: ModelConfig, number: int) -> list[Site]:
    """For queries and for keys."""
    match model.feature_map:
        case "squared" | "relu" | "elu1":
            return [(2, model.model_width * number)]  # its input, or relu's result
        case _:  # scaled input and exponential, in float32; one that was registered is taken to save as much
            return [(2, model.model_width * FLOAT), (2, model.num_heads * (model.features_per_head + 1) * FLOAT)]


def backward_sites(model: ModelConfig, train: TrainConfig) -> tuple[list[Site], list[Site]]:
    """What backward holds beside the saved tensors in the last layer, at the MLP and at attention."""
    number = _number_bytes(train)
    d, h, f, m = model.model_width, model.num_heads, model.mlp_width, model.features_per_head
    swiglu = model.activation == "swiglu"
    # Gradients: residual stream; MLP's inner layers, when one saved copy is gone.
    mlp = [(2, d * number), (3 if swiglu else 1 if train.lora is None else 2, f * number)]
    block_states = h * m * model.head_width // BLOCK
    freed = (3 if swiglu else 1) + _is_trained(train, "mlp_out")
    attention = [
        (2, d * number),  # gradients of the residual stream and of attention's output
        (2, d * FLOAT),  # of the numerator and of v
        (1, h * FLOAT),  # of the normaliser
        (2, h * m * FLOAT),  # of g(q) and g(k)
        (2, h * m * number),  # two products on their way through the feature map
        (3, max(h * BLOCK, block_states) * FLOAT),  # scores of the blocks; states of the blocks and their gradients
        (-freed, f * number),  # the MLP's saved tensors are gone when attention's turn comes
        (-1, d * number),
    ]
    if number != FLOAT:
        attention += [(2, h * m * FLOAT), (1, d * FLOAT)]  # g(q), g(k) and v once more, in float32
    return mlp, attention


def _tensors(sites: list[Site], positions: int) -> list[tuple[int, int]]:
    """How many tensors, and bytes of each."""
    return [(count, positions * width) for count, width in sites]


def _bytes(tensors: list[tuple[int, int]]) -> int:
    return sum(count * size for count, size in tensors)


def _heap_bytes(tensors: list[tuple[int, int]]) -> int:
    """Of those below the mapping threshold."""
    return max(0, _bytes([(count, size) for count, size in tensors if size < _MAPPING_THRESHOLD]))


def _heap_waste(tensors: list[tuple[int, int]]) -> float:
    """Bytes of holes in the heap, at most.

    Tensors below the mapping threshold leave holes as they come and go. Into a hole that is large enough malloc puts a
    tensor that it would map otherwise, and at another time maps it beside the hole: of two such tensors at most.
    """
    mapped = [size for _, size in tensors if size >= _MAPPING_THRESHOLD]
    heap_bytes = _heap_bytes(tensors)
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


def _token_bytes(sequence_length: int, batch: int) -> int:
    """The micro-batch's token ids: the only thing that grows with the sequence."""
    return batch * (sequence_length + 1) * FLOAT


def _projection_size(model: ModelConfig) -> int:
    """Numbers of the FAVOR+ projections."""
    return model.num_layers * model.features_per_head * model.head_width if model.feature_map == "favor" else 0
