"""Model folders in the layouts of transformers, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slim_core.weights.layout import layout_of, model_config
from slim_core.weights.tables import tensor_table

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 19,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 16,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 19,
}


def random_tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """By name in the file."""
    generator = torch.Generator().manual_seed(0)
    table = tensor_table(layout_of(config), model_config(config))
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in table.values()}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model folder; returns what is in it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_shards(folder: Path, config: dict[str, Any], count: int = 3) -> dict[str, str]:
    """The same in shards; returns the index's map."""
    tensors = write_folder(folder, config)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        chosen = dict(list(tensors.items())[number::count])
        save_file(chosen, folder / name)
        weight_map |= dict.fromkeys(chosen, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    """As it may be, or not."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
