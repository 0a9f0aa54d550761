"""What a chunk's graph holds, position by position: what autograd saves for backward, and what backward adds to it.

Whoever changes a layer in `slim_core.layers` or `slim_core.model` changes its term here. Terms are bytes per position
of a chunk (micro-batch b, chunk length C: b * C positions).

Symbols: D model width, H heads, G heads of keys and values, K head width, M features per head, F MLP width, L = 64
block.
"""

from __future__ import annotations

from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning.shapes import is_trained

HALF = 2
FLOAT = 4
INT64 = 8

SCORE_QUERIES, SCORE_KEYS, MOST_SCORE_KEYS = 128, 256, 1024
"""Of `slim_core.layers.softmax`, on a CPU."""

Site = tuple[int, int]
"""Tensors of one width: how many, and bytes per position of each."""

_OF_ATTENTION = ("query", "key_value", "output")
_OF_MLP = ("mlp_in", "mlp_out")


def saved_sites(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What autograd saves of a chunk between forward and backward of the layers. The input of a matrix product is saved
    for the gradient of its weights, where they are trained."""
    d, number = model.model_width, number_bytes(train)
    attention, mlp = saved_by_attention(model, train), saved_by_mlp(model, train)
    sites = [(count * model.num_layers, width) for count, width in (*attention, *mlp)]
    if train.lora is not None:  # below the first adapter nothing has a gradient but the states
        sites += [(-count, width) for count, width in _saved_below(model, train)]
    sites.append((1, INT64))  # tokens
    if train.dropout and train.lora is None:
        sites.append((1, d))
    if model.positions == "rotary":
        sites.append((1, model.head_width * number))  # cosines and sines, for all layers
    elif model.positions == "learned" and train.lora is None:
        sites.append((1, INT64))
    return sites


def _saved_below(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What the first layer does not save where adapters are all that is trained: below the first of them nothing has a
    gradient but a performer's states."""
    sites = _saved_by_norm(model, train) if model.norm == "pre" else []
    if model.attention == "performer":
        for layer, heads in (("query", model.num_heads), ("key_value", model.kv_heads)):
            if not is_trained(train, layer):
                sites += _saved_by_feature_map(model, heads, number_bytes(train))
        return sites
    if is_trained(train, "query", "key_value"):
        return sites
    sites += _saved_by_softmax(model, train)
    if is_trained(train, "output"):
        return [*sites, (-1, model.model_width * number_bytes(train))]
    sites += _saved_by_norm(model, train) if model.norm == "pre" else []
    return sites if is_trained(train, "mlp_in") else [*sites, *_saved_by_activation(model, train)]


def saved_in_blocks(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """The same for what lies in blocks of positions, the last one of a chunk padded: what linear attention saves."""
    if model.attention == "softmax":
        return []
    number = number_bytes(train)
    layer = [
        (2, model.num_heads * model.features_per_head * number),  # g(q), g(k)
        (2, model.model_width * number),  # v and the output
        (1, model.num_heads * FLOAT),  # the normaliser
    ]
    return [(count * model.num_layers, width) for count, width in layer]


def _saved_by_norm(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Input, mean and scale; RMS norms have no mean."""
    return [(1, model.model_width * number_bytes(train)), (1 if model.norm_type == "rms" else 2, FLOAT)]


def saved_by_attention(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Of one layer, with the norm and the residual sum, but not in blocks."""
    d, number = model.model_width, number_bytes(train)
    if model.attention == "softmax":
        own = _saved_by_softmax(model, train)
    else:
        rearranged = model.output_projection and is_trained(train, "output")  # for the projection
        own = [
            (int(rearranged), d * number),
            *_saved_by_feature_map(model, model.num_heads, number),
            *_saved_by_feature_map(model, model.kv_heads, number),
        ]
    return [
        *_saved_by_norm(model, train),
        (int(is_trained(train, "query", "key_value")), d * number),
        *own,
        *_saved_by_adapters(train, _OF_ATTENTION),
        *([(1, d)] if train.dropout else []),  # a mask of one byte
    ]


def saved_by_mlp(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Of one layer, with the norm and the residual sum."""
    d, number = model.model_width, number_bytes(train)
    return [
        *_saved_by_norm(model, train),
        (int(is_trained(train, "mlp_in")), d * number),
        *_saved_by_activation(model, train),
        (int(is_trained(train, "mlp_out")), model.mlp_width * number),  # its result
        *_saved_by_adapters(train, _OF_MLP),
        *([(1, d)] if train.dropout else []),
    ]


def _saved_by_activation(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What the activation function reads; SwiGLU also saves the gate's, before its product with the other."""
    f = model.mlp_width * number_bytes(train)
    return [(1, 2 * f), (1, f)] if model.activation == "swiglu" else [(1, f)]


def _saved_by_adapters(train: TrainConfig, layers: tuple[str, ...]) -> list[Site]:
    """What lies between their two matrices."""
    if train.lora is None:
        return []
    return [(len(set(layers) & set(train.lora.targets)), train.lora.rank * number_bytes(train))]


def head_sites(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """What the head holds beside its logits: its input, and the gradient of it, which is made with the loss."""
    number, d = number_bytes(train), model.model_width
    final_norm = _saved_by_norm(model, train) if model.norm == "pre" else []
    return [(2, d * number), (1, INT64), *final_norm]


def number_bytes(train: TrainConfig) -> int:
    """Of an activation."""
    return FLOAT if train.precision == "float32" else HALF


def _saved_by_feature_map(model: ModelConfig, heads: int, number: int) -> list[Site]:
    """Of queries; or of keys, before they are repeated for the query heads that share them."""
    width = heads * model.head_width
    match model.feature_map:
        case "squared" | "relu" | "elu1":
            return [(1, width * number)]  # its input, or relu's result
        case _:  # scaled input and exponential, in float32; one that was registered is taken to save as much
            return [(1, width * FLOAT), (1, heads * (model.features_per_head + 1) * FLOAT)]


def _saved_by_softmax(model: ModelConfig, train: TrainConfig) -> list[Site]:
    """Queries, the result, which is the projection's input as well, and a sum of weights for each head; and where a
    position's document begins. Keys and values lie in the state."""
    begins = [(1, INT64)] if train.packing == "packed" else []
    return [(2, model.model_width * number_bytes(train)), (1, model.num_heads * FLOAT), *begins]


def mlp_sites(model: ModelConfig, train: TrainConfig) -> tuple[list[Site], list[Site]]:
    """What backward holds beside the saved tensors in the last layer's MLP: before its activation function, and in
    it."""
    number = number_bytes(train)
    f = model.mlp_width * number
    # The gradient of the residual stream, and that of the branch where it is another tensor.
    streams = (2 if train.dropout or model.norm == "branch" else 1, model.model_width * number)
    product = int(is_trained(train, "mlp_out"))  # saved, and gone when the activation function has its turn
    with_adapter = train.lora is not None and product  # the gradient through the adapter and the one past it
    return (
        [streams, (2 if with_adapter else 1, f)],
        [streams, ((3 if model.activation == "swiglu" else 2) - product, f)],
    )


def score_bytes(model: ModelConfig, train: TrainConfig, batch: int, chunk_length: int) -> int:
    """Of a block of softmax attention, in float32: the weights and their gradient; queries, the gradients of them and
    of the result; in bfloat16 keys and values once more."""
    queries, keys = score_block(chunk_length)
    width = model.head_width
    numbers = model.num_heads * queries * (2 * keys + 3 * width)
    if train.precision == "bfloat16":
        numbers += 2 * model.kv_heads * keys * width
    hidden = queries * keys * (3 if train.packing == "packed" else 1)  # booleans
    return batch * (FLOAT * numbers + hidden)


def score_block(chunk_length: int) -> tuple[int, int]:
    """Queries and keys whose scores exist together (`slim_core.layers.softmax`)."""
    queries = min(chunk_length, SCORE_QUERIES)
    return queries, max(SCORE_KEYS, min(MOST_SCORE_KEYS, SCORE_QUERIES * SCORE_KEYS // queries))


def attention_sites(model: ModelConfig, train: TrainConfig, block: int) -> list[Site]:
    """What backward holds in the last layer's attention, beside what is saved but for the MLP's."""
    number = number_bytes(train)
    d, h, m = model.model_width, model.num_heads, model.features_per_head
    if model.attention == "softmax":
        # Gradients of the residual stream, of its branch where that is another tensor, of the result and of queries.
        # Those of keys and values lie in the gradient of the state.
        return [(4 if train.dropout or model.norm == "branch" else 3, d * number)]
    block_states = h * m * model.head_width // block
    # States of the blocks, before them and what they add; or the gradient of v and the blocks' scores.
    in_blocks = max(2 * block_states, d + h * block) * FLOAT
    if train.packing == "packed":
        # Features that no border cuts off, beside both; or the terms of a gradient of features apart, beside one. And
        # which positions of a block belong together.
        in_blocks = max(in_blocks, max(2 * block_states + h * m, block_states + 3 * h * m) * FLOAT) + block
    sites = [
        (2, d * number),  # gradients of the residual stream and of attention's output
        (1, d * FLOAT),  # of the numerator
        (1, h * FLOAT),  # of the normaliser
        (2, h * m * FLOAT),  # of g(q) and g(k)
        (1, in_blocks),
    ]
    if number != FLOAT:
        sites += [(2, h * m * FLOAT), (1, d * FLOAT)]  # g(q), g(k) and v once more, in float32
    return sites
