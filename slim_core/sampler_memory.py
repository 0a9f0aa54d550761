"""What sampling takes, known before torch is loaded: from the model's config and the headers of its weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

from slim_core.config import ModelConfig

RUNTIME_BYTES = 200 << 20
"""Python and torch on one thread: 177 MiB were measured (torch 2.13 on x86-64)."""
PROMPT_CHUNK = 512
"""Tokens of the prompt that are read at once."""
_FLOAT_BYTES = 4
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def required_bytes(folder: Path, config: ModelConfig, positions: int) -> int:
    """Private memory at the peak of sampling a text of `positions` tokens, prompt included; an estimate.

    All weights are float32 then, and the file they are read from is mapped privately. Raises OSError and ValueError for
    a file that is none.
    """
    files = sorted(folder.glob("model*.safetensors"))
    weights = sum(_elements(path) for path in files) * _FLOAT_BYTES
    mapped = max((path.stat().st_size for path in files), default=0)
    width, heads = config.model_width, config.num_heads
    # Of a chunk of the prompt: what one layer keeps, generously; of one token: logits, their order and their sums.
    features = config.num_features or config.head_width
    chunk = PROMPT_CHUNK * (8 * width + 3 * config.mlp_in_width + 2 * heads * features)
    if config.attention == "softmax":
        state = config.num_layers * positions * 2 * config.kv_heads * config.head_width
        chunk += 2 * heads * PROMPT_CHUNK * positions
    else:
        state = config.num_layers * heads * features * (config.head_width + 1)
    return RUNTIME_BYTES + weights + mapped + (chunk + 3 * state + 8 * config.vocab_size) * _FLOAT_BYTES


def _elements(path: Path) -> int:
    """Numbers in a safetensors file, by its header: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.name}: a header of {length} bytes")
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
