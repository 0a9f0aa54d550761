"""How long a plan takes: the work of each kind in a step, times what that work costs on the machine.

    step seconds = (N - 1) * pass 1 of a chunk + N * pass 2 of a chunk + update

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. A term says how often a layer
or a chunk runs a primitive, forward and backward, and on how many numbers a row; what it costs was measured primitive
by primitive (`slim_core.planning.costs`). All chunks count as equally long.

Symbols: S layers, D model width, H heads, K head width, M features per head, F MLP width, V vocabulary, N chunks,
R rows = micro-batch times positions of a chunk.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from slim_core.config import LoraConfig, ModelConfig, TrainConfig
from slim_core.planning.costs import Costs, Curve, Passes, Update, at_rows, at_size, at_width
from slim_core.planning.memory_model import (
    BLOCK,
    Schedule,
    default_stride,
    head_block_rows,
)
from slim_core.planning.plan import Calibration, Workload
from slim_core.planning.shapes import layer_matrices, num_trained, num_trained_tensors
from slim_core.planning.sites import score_block

_BACKWARD = 2
"""Cost of backward in forwards: a product for each of its two operands."""
_CONTRIBUTION = 0.3
"""Share of attention's forward pass that adds to a state, or takes from it: a product of four, and some copies."""
_NARROW_HEAD, _WIDE_HEAD = 32, 64
"""Head widths for which attention is measured."""


class _Site(NamedTuple):
    """A primitive in a layer."""

    primitive: str
    """Its name in `Costs`."""
    width: float
    """Numbers per row."""
    forward: float
    """How often in a forward pass."""
    backward: float
    """How often in a backward pass, a mean over the layers: adapters leave some layers without one."""


class _Product(NamedTuple):
    """A product with the weights of a layer."""

    width: float
    """Geometric mean of inputs and outputs."""
    backward: float
    """Products for the gradient of the input."""
    gradients: float
    """Products for the gradient of the weights."""


class _Gradient(NamedTuple):
    """A sum of gradients in a layer's backward pass."""

    primitive: str
    width: float
    times: float


class _Layer(NamedTuple):
    """What a schedule does not change."""

    sites: tuple[_Site, ...]
    gradients: tuple[_Gradient, ...]
    products: tuple[_Product, ...]
    attention_backward: float
    """Share of layers whose attention has a backward pass."""


class _Seconds(NamedTuple):
    """Of one chunk."""

    forward: float
    backward: float


def step_seconds(workload: Workload, schedule: Schedule, calibration: Calibration) -> float:
    """Predicted seconds of one optimiser step."""
    model, train = workload.model, workload.train
    costs = calibration.float32 if train.precision == "float32" else calibration.bfloat16
    overheads = calibration.overheads
    num_chunks = math.ceil(train.sequence_length / schedule.chunk_length)
    micro_batches = math.ceil(train.batch_size / schedule.micro_batch_size)
    length = train.sequence_length / num_chunks
    batch = train.batch_size / micro_batches
    products = at_rows(costs.product, batch * length)

    layer = _layer_of(model, train, num_chunks > 1)
    attention, contribution = _attention_seconds(model, train, costs, batch, length)
    forward, backward = _layer_seconds(layer, costs, products, batch * length)
    forward += attention.forward + overheads.layer_forward
    backward += layer.attention_backward * attention.backward + overheads.layer_backward
    keys_and_values = at_width(products, math.sqrt(2 * model.kv_width * model.model_width))
    keys_and_values += contribution + overheads.layer_forward / 2
    mask = _mask_seconds(model, train, costs, batch, length)
    forward += 2 * mask.forward
    backward += 2 * mask.backward
    ends = _ends_seconds(model, train, costs, batch, length)
    ends_forward = ends.forward + mask.forward + overheads.chunk_forward

    pass_1 = (model.num_layers - 1) * forward + keys_and_values + ends_forward
    pass_2 = model.num_layers * (forward + backward) + ends_forward + ends.backward + overheads.chunk_backward
    pass_2 += _head_seconds(model, train, costs, batch * length)
    seconds = (num_chunks - 1) * pass_1 + num_chunks * pass_2
    if schedule.state_policy == "reverse":
        seconds += max(0, num_chunks - 2) * model.num_layers * contribution  # not the last chunk, nor the first
    elif schedule.state_policy == "stride":
        seconds += (num_chunks - 1) * (1 - 1 / default_stride(num_chunks)) * pass_1  # one of each k sets is kept
    seconds = micro_batches * seconds * costs.in_step + _update_seconds(model, train, calibration)
    return seconds * calibration.time_factor


@lru_cache(maxsize=64)
def _layer_of(model: ModelConfig, train: TrainConfig, chunked: bool) -> _Layer:
    """Everything in a block but attention itself (`slim_core.model.Block`)."""
    d = model.model_width
    # With adapters nothing below the lowest trained layer has a gradient: in block 0 not the input of its attention,
    # nor queries, keys and values without an adapter; attention itself then has one for its entry state only.
    above = 1.0 if train.lora is None else (model.num_layers - 1) / model.num_layers
    adapted = () if train.lora is None else train.lora.targets
    at_heads = 1.0 if train.lora is None or {"query", "key_value"} & {*adapted} else above
    at_attention = 1.0 if chunked and model.attention == "performer" else at_heads
    at_both = (d + model.kv_width) / 2  # a mean of queries and keys
    sites = [
        _Site(_norm_of(model), d, 2, 1 + above),
        _Site("add", d, 2, 0),
        _Site(model.activation, model.mlp_width, 1, 1),
    ]
    if bias_width := _bias_width(model):
        sites.append(_Site("add", bias_width, 1, 0))  # copied before the product adds to them
    if model.attention == "softmax":
        sites.append(_Site("heads", model.kv_width, 1, at_heads))  # k and v, into the state
    else:
        sites.append(_Site("heads", at_both, 2, 2 * at_heads))  # q, k, v, and attention's output: two copies each time
        shared = model.num_heads // model.kv_heads
        features = model.num_heads * model.features_per_head
        sites.append(_Site(model.feature_map, features * (1 + 1 / shared) / 2, 2, 2 * at_heads))
        if shared > 1:  # features of keys, and values, repeated for every query head
            sites.append(_Site("add", features + d, 1, at_heads))
    if model.positions == "rotary":
        sites.append(_Site("rotary", at_both, 2, 2 * at_heads))
    # Of x twice, and of attention's input from queries, keys and values.
    gradients = [_Gradient("add", d, 3 * above)]
    if train.lora is None and bias_width:
        gradients.append(_Gradient("column_sum", bias_width, 1))
    products = []
    at_mlp = 1.0 if at_attention == 1.0 or "output" in adapted else above
    at_inputs = {
        "query": above,
        "key_value": above,
        "output": at_attention,
        "mlp_in": at_mlp,
        "mlp_out": 1.0 if "mlp_in" in adapted else at_mlp,
    }
    for name, (outputs, inputs) in layer_matrices(model).items():
        products.append(_Product(math.sqrt(outputs * inputs), at_inputs[name], float(train.lora is None)))
        if train.lora is not None and name in adapted:
            share = (train.lora.rank - 8) / (32 - 8)
            width = (outputs + inputs) / 2
            sites += [_Site("adapter_8", width, 1 - share, 1 - share), _Site("adapter_32", width, share, share)]
    return _Layer(tuple(sites), tuple(gradients), tuple(products), at_attention)


def _norm_of(model: ModelConfig) -> str:
    """The name of its primitive in `Costs`."""
    return "rms_norm" if model.norm_type == "rms" else "norm"


def _bias_width(model: ModelConfig) -> int:
    """All biases of a layer."""
    d = model.model_width
    attention = (d + 2 * model.kv_width if model.attention_bias else 0) + (d if model.output_bias else 0)
    return attention + (model.mlp_in_width + d if model.mlp_bias else 0)


def _layer_seconds(layer: _Layer, costs: Costs, products: Curve, rows: float) -> _Seconds:
    """One layer without its attention."""
    forward = backward = 0.0
    for primitive, width, forwards, backwards in layer.sites:
        passes: Passes = getattr(costs, primitive, costs.favor)  # a map that was registered counts as FAVOR+
        if forwards:
            forward += forwards * at_size(passes.forward, width * rows)
        if backwards:
            backward += backwards * at_size(passes.backward, width * rows)
    for primitive, width, times in layer.gradients:
        sums: Passes = getattr(costs, primitive)
        backward += times * at_size(sums.forward, width * rows)
    gradients = at_rows(costs.weight_gradient, rows)
    for width, backwards, weights in layer.products:
        seconds = at_width(products, width)
        forward += seconds
        backward += backwards * seconds
        if weights:
            backward += at_width(gradients, width)
    return _Seconds(forward, backward)


def _attention_seconds(
    model: ModelConfig, train: TrainConfig, costs: Costs, batch: float, length: float
) -> tuple[_Seconds, float]:
    """Attention itself, and what a chunk adds to a state alone."""
    if model.attention == "softmax":
        return _softmax_seconds(model, train, costs, batch, length), 0.0
    return _linear_seconds(model, costs, batch, length)


def _softmax_seconds(model: ModelConfig, train: TrainConfig, costs: Costs, batch: float, length: float) -> _Seconds:
    """Of a chunk with as many positions before it as the mean chunk, block by block (`slim_core.layers.softmax`)."""
    blocks, scores = score_blocks(length, (train.sequence_length - length) / 2)
    scores *= batch * model.num_heads / blocks
    # Along a straight line between the two widths measured: passes over scores, and products with keys and values.
    share = (model.head_width - _NARROW_HEAD) / (_WIDE_HEAD - _NARROW_HEAD)
    narrow, wide = costs.softmax_32, costs.softmax_64
    forward, backward = (
        max(0.0, (1 - share) * at_size(narrow_curve, scores) + share * at_size(wide_curve, scores))
        for narrow_curve, wide_curve in ((narrow.forward, wide.forward), (narrow.backward, wide.backward))
    )
    return _Seconds(blocks * forward, blocks * backward)


def score_blocks(length: float, before: float) -> tuple[float, float]:
    """How many blocks of scores a chunk has that begins at position `before`, and how many scores of one head are in
    all of them: for each block of queries one with its own keys, and the keys before them in blocks."""
    queries, keys = score_block(math.ceil(length))
    parts = math.ceil(length / queries)
    mean = length / parts  # queries of a block
    earlier = before + (length - mean) / 2
    return parts * (1 + math.ceil(earlier / keys)), length * (mean + earlier)


def _linear_seconds(model: ModelConfig, costs: Costs, batch: float, length: float) -> tuple[_Seconds, float]:
    """Attention itself (`slim_core.layers.performer`), and what a chunk adds to a state alone."""
    head, features = model.head_width, model.features_per_head
    narrow = head < math.sqrt(_NARROW_HEAD * _WIDE_HEAD)
    curve, measured = (costs.attention_32, _NARROW_HEAD) if narrow else (costs.attention_64, _WIDE_HEAD)
    # Products within a block, and of a block with its state, for each number of the output.
    work = (BLOCK * (features + head) + 2 * features * head) / head
    work /= (BLOCK * 2 * measured + 2 * measured**2) / measured
    numbers = batch * length * model.model_width
    state, blocks = batch * model.state_size, math.ceil(length / BLOCK)
    products = work * at_size(curve.forward, numbers)
    forward = products + state * costs.state.forward[0] + blocks * costs.block.forward[0]
    backward = work * at_size(curve.backward, numbers)
    backward += state * costs.state.backward[0] + blocks * costs.block.backward[0]
    return _Seconds(forward, backward), _CONTRIBUTION * products + state * costs.state.forward[0]


def _mask_seconds(model: ModelConfig, train: TrainConfig, costs: Costs, batch: float, length: float) -> _Seconds:
    """One dropout. Whole blocks are drawn, one more where a chunk begins within a block."""
    if not train.dropout:
        return _Seconds(0.0, 0.0)
    cut = 0 if length == train.sequence_length or length % BLOCK == 0 else 1
    drawn = batch * BLOCK * (math.ceil(length / BLOCK) + cut) * model.model_width
    applied = batch * length * model.model_width
    return _Seconds(at_size(costs.dropout.forward, drawn), at_size(costs.dropout.backward, applied))


def _ends_seconds(model: ModelConfig, train: TrainConfig, costs: Costs, batch: float, length: float) -> _Seconds:
    """Embedding with positions, and final norm."""
    d = model.model_width
    numbers = batch * length * d
    scaled = at_size(costs.add.forward, numbers)
    forward = at_size(costs.embedding.forward, batch * length * model.embedding_width)
    backward = 0.0
    if model.scaled_embeddings and model.positions != "concatenated":
        forward += scaled
        backward += scaled
    positions = {"sinusoidal": d, "concatenated": d // 2, "rotary": model.head_width}.get(model.positions, 0)
    if positions:
        forward += at_size(costs.sinusoids.forward, length * positions) + scaled
    if train.lora is None:
        backward += at_size(costs.embedding.backward, batch * length * model.embedding_width)
    if model.norm == "pre":
        norm: Passes = getattr(costs, _norm_of(model))
        backward += at_size(norm.forward, numbers) + at_size(norm.backward, numbers)
    return _Seconds(forward, backward)


def _head_seconds(model: ModelConfig, train: TrainConfig, costs: Costs, rows: float) -> float:
    """Logits, loss and all gradients of the head, a block of rows at a time (`slim_core.layers.head`)."""
    size = min(rows, head_block_rows(model.vocab_size))
    width = math.sqrt(model.model_width * model.vocab_size)
    loss = costs.smoothed_loss if train.label_smoothing else costs.loss
    seconds = 2 * at_width(at_rows(costs.product, size), width) + at_size(loss.forward, size * model.vocab_size)
    if train.lora is None:
        seconds += at_width(at_rows(costs.weight_gradient, size), width)
    return rows / size * seconds


def _update_seconds(model: ModelConfig, train: TrainConfig, calibration: Calibration) -> float:
    """Clipping, the optimiser and zeroing of the gradient (`slim_core.train`)."""
    update: Update = getattr(calibration, train.optimizer.name)
    numbers = num_trained(model, train)
    return update.per_step + update.per_tensor * num_trained_tensors(model, train) + update.per_number * numbers


def step_flops(model: ModelConfig, tokens: int, num_chunks: int, lora: LoraConfig | None = None) -> float:
    """Floating-point operations of one optimiser step over `tokens` positions in chunks, pass 1 and pass 2, of a model
    with linear attention."""
    forward = _forward_flops(model)
    states_only = (num_chunks - 1) / num_chunks * _states_flops(model)
    adapters = 0.0 if lora is None else (1 + _BACKWARD) * _adapter_flops(model, lora) - _weight_gradient_flops(model)
    return tokens * ((1 + _BACKWARD) * forward + states_only + adapters)


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
    last = 4.0 * model.model_width * model.kv_width + _contribution_flops(model)
    return (model.num_layers - 1) * _layer_flops(model) + last


def _adapter_flops(model: ModelConfig, lora: LoraConfig) -> float:
    """Per position and for all layers, forward."""
    shapes = layer_matrices(model)
    return 2.0 * model.num_layers * lora.rank * sum(sum(shapes[name]) for name in lora.targets)


def _weight_gradient_flops(model: ModelConfig) -> float:
    """Per position: what frozen matrices save in backward."""
    return 2.0 * (model.num_layers * _matrix_numbers(model) + model.model_width * model.vocab_size)
