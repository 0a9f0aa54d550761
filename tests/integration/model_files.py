"""Tiny models as users have them, written by hand: a Llama with grouped heads and its tokenizer."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import decoders as tokenizer_decoders
from tokenizers.models import BPE

END = "<|endoftext|>"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

Tensors = dict[str, npt.NDArray[np.float32]]
Files = dict[str, bytes]


def llama_tensors(config: Mapping[str, Any] = LLAMA, seed: int = 0) -> Tensors:
    """Weights under the names of transformers' Llama."""
    generator = np.random.default_rng(seed)
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> npt.NDArray[np.float32]:
        return (generator.standard_normal((rows, columns)) / math.sqrt(columns)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], width), "model.norm.weight": np.ones(width)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(width)
        for projection, rows in (("q_proj", width), ("k_proj", keys), ("v_proj", keys), ("o_proj", width)):
            tensors[f"{name}.self_attn.{projection}.weight"] = matrix(rows, width)
        for projection in ("gate_proj", "up_proj"):
            tensors[f"{name}.mlp.{projection}.weight"] = matrix(inner, width)
        tensors[f"{name}.mlp.down_proj.weight"] = matrix(width, inner)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def safetensors(tensors: Tensors) -> bytes:
    """A file of these, by the format's description."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        entry = {"dtype": "F32", "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    return with_header(header, data)


def with_header(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tokenizer_json() -> bytes:
    """Bytes as GPT-2's tokenizers write them, and one token that ends a document: 257 tokens."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizer_decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer.to_str().encode()


def llama(config: Mapping[str, Any] = LLAMA, tensors: Tensors | None = None) -> Files:
    """All files of a model, by name."""
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": safetensors(llama_tensors(config) if tensors is None else tensors),
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps({"eos_token": END}).encode(),
        "generation_config.json": json.dumps({"temperature": 0.7}).encode(),
    }


def sharded(files: Files) -> Files:
    """The same in two shards."""
    tensors = llama_tensors()
    names = list(tensors)
    parts = {f"model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in (0, 1)}
    shards = {file: safetensors({name: tensors[name] for name in part}) for file, part in parts.items()}
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    others = {name: content for name, content in files.items() if name != "model.safetensors"}
    return {**others, **shards, "model.safetensors.index.json": index}
