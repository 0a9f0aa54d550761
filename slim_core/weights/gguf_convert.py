"""A GGUF file as a folder in a layout of the `transformers` library: config.json, weights, tokenizer.

Architectures llama (Llama, Mistral, SmolLM2), qwen2 and gpt2, in every type that the `gguf` package dequantises:
float16 stays, all others become float32. Tensors are read, dequantised and written a few rows at a time; only a matrix
of GPT-2, which is turned over, is in memory as a whole. Free of torch.

Source: llama.cpp's conversion, which this undoes: Llama's queries and keys have the channels that turn together side by
side there, half a head apart in transformers; GPT-2's matrices are (outputs, inputs) there, (inputs, outputs) here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import quants
from gguf.constants import GGMLQuantizationType

from slim_core.weights.folder import FolderSummary, ModelFolderError, check_folder
from slim_core.weights.gguf_file import GgufError, GgufFile, GgufTensor, read_gguf
from slim_core.weights.gguf_tokenizer import special_ids, tokenizer_files
from slim_core.weights.header import header_bytes

_BLOCK_NUMBERS = 1 << 18
"""Weights that are dequantised at a time: 1 MiB, and several times that on the way."""
_MAX_LAYERS = 10_000
_LLAMA_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_TENSORS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_LLAMA_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GPT2_OUTSIDE = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_FREQUENCIES = "rope_freqs.weight"
"""How much slower each pair of channels turns: what llama.cpp makes of Llama 3.1's scaling."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8_192}
"""Of all models published with it; they differ in the factor."""
_Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor of the folder and how it comes from one of the file."""

    source: GgufTensor
    heads: int = 0
    """Of queries or keys whose channels are to be sorted; 0 for other tensors."""
    transposed: bool = False

    @property
    def dtype(self) -> str:
        return "F16" if self.source.kind is GGMLQuantizationType.F16 else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[::-1] if self.transposed else self.source.shape


def convert(source: Path, out: Path) -> FolderSummary:
    """Make the folder `out` from a file: complete, checked and on disk, or not there. Raises GgufError and OSError."""
    file = read_gguf(source, lambda name: not name.startswith("general.") or name == "general.architecture")
    targets, config = _targets(file), _config(file)
    tokenizer, tokenizer_config = tokenizer_files(file.fields, str(file.fields["general.architecture"]))
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "tokenizer.json", tokenizer)
        _write_json(temporary / "tokenizer_config.json", tokenizer_config)
        _write_json(temporary / "generation_config.json", special_ids(file.fields))
        del tokenizer, tokenizer_config
        _write_weights(temporary / "model.safetensors", source, targets)
        summary = check_folder(temporary)
        temporary.rename(out)
    except ModelFolderError as error:
        raise GgufError(str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _targets(file: GgufFile) -> dict[str, _Target]:
    """By name in the folder."""
    architecture = _architecture(file)
    outside = _GPT2_OUTSIDE if architecture == "gpt2" else _LLAMA_OUTSIDE
    targets: dict[str, _Target] = {}
    for name, tensor in file.tensors.items():
        quants_known = tensor.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) or tensor.kind in _known()
        if not quants_known:
            raise GgufError(f"{name!r}: the type {tensor.kind.name} is not supported")
        if name in outside:
            if name == "output.weight" and _is_tied(file):
                continue
            targets[outside[name]] = _Target(tensor)
        elif (block := _BLOCK.fullmatch(name)) is not None:
            targets.update([_block_target(file, tensor, *block.groups())])
        elif name != _FREQUENCIES:
            raise GgufError(f"unknown tensor {name!r}")
    return targets


def _known() -> set[GGMLQuantizationType]:
    return set(quants._type_traits)  # noqa: SLF001  # there is no public list of what can be dequantised


def _block_target(file: GgufFile, tensor: GgufTensor, layer: str, part: str, kind: str) -> tuple[str, _Target]:
    architecture = _architecture(file)
    names = _GPT2_TENSORS if architecture == "gpt2" else _LLAMA_TENSORS
    if part not in names:
        raise GgufError(f"unknown tensor {tensor.name!r}")
    if architecture == "gpt2":
        matrix = kind == "weight" and not part.endswith("_norm")
        return f"transformer.h.{layer}.{names[part]}.{kind}", _Target(tensor, transposed=matrix)
    heads = 0
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = _number(file, "attention.head_count" if part == "attn_q" else "attention.head_count_kv")
        if heads < 1 or tensor.shape[0] % (2 * heads):
            raise GgufError(f"{tensor.name!r} has shape {tensor.shape}: no whole heads of {heads}")
    return f"model.layers.{layer}.{names[part]}.{kind}", _Target(tensor, heads=heads)


def _config(file: GgufFile) -> dict[str, Any]:
    """config.json."""
    architecture = _architecture(file)
    embeddings = _tensor(file, "token_embd.weight")
    layers = _number(file, "block_count")
    if layers > _MAX_LAYERS:
        raise GgufError(f"{architecture}.block_count: {layers}; at most {_MAX_LAYERS} are read")
    shared = {
        "model_type": architecture,
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors or _is_tied(file),
        "torch_dtype": "float32",
        **special_ids(file.fields),
    }
    if architecture == "gpt2":
        return {
            "architectures": ["GPT2LMHeadModel"],
            **shared,
            "n_layer": layers,
            "n_embd": _number(file, "embedding_length"),
            "n_head": _number(file, "attention.head_count"),
            "n_inner": _number(file, "feed_forward_length"),
            "n_positions": _tensor(file, "position_embd.weight").shape[0],
            "layer_norm_epsilon": _real(file, "attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }
    heads, width = _number(file, "attention.head_count"), _number(file, "embedding_length")
    head_width = _number(file, "attention.key_length", width // max(heads, 1))
    if _number(file, "rope.dimension_count", head_width) != head_width:
        raise GgufError(f"{architecture}.rope.dimension_count: only {head_width}, all of a head, is supported")
    for name in ("expert_count", "attention.sliding_window"):
        if _number(file, name, 0):
            raise GgufError(f"{architecture}.{name}: not supported")
    biases = {"attention_bias": "blk.0.attn_q.bias" in file.tensors} if architecture == "llama" else {}
    return {
        "architectures": ["LlamaForCausalLM" if architecture == "llama" else "Qwen2ForCausalLM"],
        **shared,
        **biases,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": _number(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(file, "attention.head_count_kv", heads),
        "head_dim": head_width,
        "max_position_embeddings": _number(file, "context_length"),
        "rms_norm_eps": _real(file, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": _real(file, "rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(file, head_width),
    }


def _scaling(file: GgufFile, head_width: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    architecture = _architecture(file)
    if _FREQUENCIES in file.tensors:
        return _llama3_scaling(file, head_width)
    kind = file.fields.get(f"{architecture}.rope.scaling.type", "none")
    factor = _real(file, "rope.scaling.factor", _real(file, "rope.scale_linear", 1.0))
    if kind == "linear" or (kind == "none" and "rope.scale_linear" in file.fields):
        return {"rope_type": "linear", "factor": factor} if factor != 1 else None
    if kind != "none":
        raise GgufError(f"{architecture}.rope.scaling.type: {kind!r} is not supported; linear is")
    return None


def _llama3_scaling(file: GgufFile, head_width: int) -> dict[str, Any]:
    """The scaling that gives the file's factors. It is known by its effect only."""
    tensor = _tensor(file, _FREQUENCIES)
    if tensor.kind is not GGMLQuantizationType.F32 or tensor.shape != (head_width // 2,):
        raise GgufError(f"{_FREQUENCIES}: not one float32 for each of {head_width // 2} pairs of channels")
    with file.path.open("rb") as handle:
        found = _read(handle, tensor, 0, 1)
    factor = float(found.max())
    base = _real(file, "rope.freq_base", 10_000.0)
    channels = np.arange(0, head_width, 2)
    turns = _LLAMA3["original_max_position_embeddings"] / (2 * np.pi * base ** (channels / head_width))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise GgufError(f"{_FREQUENCIES}: scaled otherwise than Llama 3.1's positions, which is not supported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _is_tied(file: GgufFile) -> bool:
    """Whether the head is a copy of the embeddings, bit for bit."""
    head, embeddings = file.tensors.get("output.weight"), _tensor(file, "token_embd.weight")
    if head is None or (head.kind, head.shape) != (embeddings.kind, embeddings.shape):
        return False
    with file.path.open("rb") as one, file.path.open("rb") as other:
        one.seek(head.offset)
        other.seek(embeddings.offset)
        left = head.bytes
        while left:
            size = min(left, _BLOCK_NUMBERS)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def _write_weights(path: Path, source: Path, targets: dict[str, _Target]) -> None:
    names, header = header_bytes({name: (target.dtype, target.shape) for name, target in targets.items()})
    with source.open("rb") as reader, path.open("wb") as writer:
        writer.write(header)
        for name in names:
            for numbers in _numbers(reader, targets[name]):
                writer.write(np.ascontiguousarray(numbers).data)
        writer.flush()
        os.fsync(writer.fileno())


def _numbers(reader: BinaryIO, target: _Target) -> Iterator[_Numbers]:
    """A tensor of the folder in pieces."""
    tensor = target.source
    if len(tensor.shape) == 1:
        numbers = _read(reader, tensor, 0, 1)
        yield _sorted_channels(numbers.reshape(target.heads, -1, 1)) if target.heads else numbers
    elif target.heads:
        width = tensor.shape[0] // target.heads
        for head in range(target.heads):
            yield _sorted_channels(_read(reader, tensor, head * width, width)[None])
    elif target.transposed:
        whole = np.empty(tensor.shape, np.float16 if target.dtype == "F16" else np.float32)
        for first, rows in _row_blocks(tensor):
            whole[first : first + rows] = _read(reader, tensor, first, rows)
        step = max(1, _BLOCK_NUMBERS // len(whole))
        for first in range(0, whole.shape[1], step):
            yield whole[:, first : first + step].T
    else:
        for first, rows in _row_blocks(tensor):
            yield _read(reader, tensor, first, rows)


def _sorted_channels(heads: _Numbers) -> _Numbers:
    """(H, K, .) with pairs of channels side by side -> with the first of all pairs, then the second."""
    count, width, inputs = heads.shape
    return heads.reshape(count, width // 2, 2, inputs).swapaxes(1, 2).reshape(heads.shape)


def _row_blocks(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    rows, width = tensor.shape
    step = max(1, _BLOCK_NUMBERS // width)
    return ((first, min(step, rows - first)) for first in range(0, rows, step))


def _read(reader: BinaryIO, tensor: GgufTensor, first: int, rows: int) -> _Numbers:
    """Rows of a matrix, or all of a vector as its only row: dequantised to float32, or float16 as they are."""
    total = tensor.shape[0] if len(tensor.shape) > 1 else 1
    row_bytes = tensor.bytes // total
    reader.seek(tensor.offset + first * row_bytes)
    raw = reader.read(rows * row_bytes)
    width = tensor.shape[-1]
    shape = (rows, width) if len(tensor.shape) > 1 else (width,)
    match tensor.kind:
        case GGMLQuantizationType.F32:
            return np.frombuffer(raw, "<f4").reshape(shape)
        case GGMLQuantizationType.F16:
            return np.frombuffer(raw, "<f2").reshape(shape)
        case kind:
            packed = np.frombuffer(raw, np.uint8).reshape(rows, row_bytes)
            return quants.dequantize(packed, kind).astype(np.float32, copy=False).reshape(shape)


def _architecture(file: GgufFile) -> str:
    architecture = file.fields.get("general.architecture")
    if architecture not in ("llama", "qwen2", "gpt2"):
        raise GgufError(f"general.architecture: {architecture!r} is not supported; llama, qwen2 and gpt2 are")
    return str(architecture)


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise GgufError(f"no tensor {name!r}")
    return file.tensors[name]


def _number(file: GgufFile, name: str, default: int | None = None) -> int:
    value = file.fields.get(f"{_architecture(file)}.{name}", default)
    if not isinstance(value, int) or value < 0:
        raise GgufError(f"{_architecture(file)}.{name}: must be a whole number, not {str(value)[:40]}")
    return value


def _real(file: GgufFile, name: str, default: float | None = None) -> float:
    """A float32 as people write it: 1e-05, not 9.999999747378752e-06."""
    value = file.fields.get(f"{_architecture(file)}.{name}", default)
    if not isinstance(value, float):
        raise GgufError(f"{_architecture(file)}.{name}: must be a number, not {str(value)[:40]}")
    return float(str(np.float32(value)))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(data, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
