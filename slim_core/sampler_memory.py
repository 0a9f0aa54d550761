"""What sampling takes, known before torch is loaded: from the model's config and the sizes of its files."""

from __future__ import annotations

from pathlib import Path

from slim_core.config import ModelConfig
from slim_core.weights.folder import weight_files

RUNTIME_BYTES = 200 << 20
"""Python and torch on one thread: 177 MiB were measured (torch 2.13 on x86-64)."""
PROMPT_CHUNK = 512
"""Tokens of the prompt that are read at once."""
_FLOAT_BYTES = 4


def required_bytes(folder: Path, config: ModelConfig, positions: int) -> int:
    """Private memory at the peak of sampling a text of `positions` tokens, prompt included; an estimate.

    All weights are float32 then, and of the files, one after the other, each is mapped privately while it is read.
    Raises ModelFolderError, OSError.
    """
    mapped = max(path.stat().st_size for path in weight_files(folder))
    width, heads = config.model_width, config.num_heads
    # Of a chunk of the prompt: what one layer keeps, generously; of one token: logits, their order and their sums.
    features = config.num_features or config.head_width
    chunk = PROMPT_CHUNK * (8 * width + 3 * config.mlp_in_width + 2 * heads * features)
    if config.attention == "softmax":
        state = config.num_layers * positions * 2 * config.kv_heads * config.head_width
        chunk += 2 * heads * PROMPT_CHUNK * positions
    else:
        state = config.num_layers * heads * features * (config.head_width + 1)
    numbers = config.num_parameters + chunk + 3 * state + 8 * config.vocab_size
    return RUNTIME_BYTES + mapped + numbers * _FLOAT_BYTES
