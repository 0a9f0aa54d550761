"""What the phase of matching holds (`slim_core.matching`): one layer at a time, over one sequence.

Whoever changes a layer changes its term in `slim_core.planning.sites`; here they are put together in another order.

Symbols: L positions of a matching sequence, D model width, F MLP width.
"""

from __future__ import annotations

import math
from dataclasses import replace

from slim_core.config import ModelConfig, TrainConfig
from slim_core.planning.shapes import layer_matrices
from slim_core.planning.sites import (
    FLOAT,
    Site,
    attention_sites,
    number_bytes,
    saved_by_attention,
    saved_in_blocks,
    score_bytes,
)

_BLOCK = 64
"""Of `slim_core.layers.performer`."""
_STATE_NUMBERS = 5 * 2
"""A state in float64 at entry and exit, the gradients of both and one on the way, in numbers of float32."""


def adapter_moments(model: ModelConfig, train: TrainConfig) -> int:
    """Bytes of the phase's own AdamW: two moments of the adapters of attention."""
    assert train.lora is not None
    shapes = layer_matrices(model)
    trained = {"query", "key_value", "output"} & set(train.lora.targets)
    return 2 * FLOAT * model.num_layers * train.lora.rank * sum(sum(shapes[name]) for name in trained)


def layer_bytes(model: ModelConfig, train: TrainConfig, length: int) -> int:
    """Bytes of the layer that holds most at its worst moment: in the new attention's backward pass, in the MLP, which
    only runs forward, or in the old attention likewise."""
    number, d = number_bytes(train), model.model_width
    layer = replace(model, num_layers=1)
    padded = math.ceil(length / _BLOCK) * _BLOCK
    streams = [(3, d * number)]  # the residual stream, attention's input, the output that is wanted
    student = [
        *saved_by_attention(layer, train),
        *attention_sites(layer, train, min(_BLOCK, length)),
        (3, d * FLOAT),  # difference and squares, and a gradient of both
    ]
    blocks = saved_in_blocks(layer, train)
    in_student = _bytes(student, length) + _bytes(blocks, padded) + FLOAT * _STATE_NUMBERS * model.state_size
    adapted = 2 if train.lora is not None and {"mlp_in", "mlp_out"} & set(train.lora.targets) else 0
    mlp = [(1 + adapted, model.mlp_in_width * number), (2 + adapted, model.mlp_width * number), (3, d * number)]
    # Queries, their copies and the result; keys and values, their copies and the state.
    teacher = [(4, d * number), (6, model.kv_width * number)]
    in_teacher = _bytes(teacher, length) + score_bytes(model, train, 1, length)
    return _bytes(streams, length) + max(in_student, _bytes(mlp, length), in_teacher)


def _bytes(sites: list[Site], positions: int) -> int:
    return positions * sum(count * width for count, width in sites)
