"""Weights in the layouts of the `transformers` library: which pieces a file consists of, and adapters as PEFT has them.

Nothing here exists as a whole that the model does not have as a whole: a matrix that adapters change, or that the file
has the other way round, is made a few rows at a time.

Legend: I inputs, O outputs of a layer, r rank; W (O, I), A (r, I), B (O, r).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slim_core.model import LanguageModel
from slim_core.weights.files import Pieces, write_json, write_tensors
from slim_core.weights.layout import Layout
from slim_core.weights.lora import LoraLinear, adapters
from slim_core.weights.tables import FileTensor, Rows, tensor_table

_BLOCK_NUMBERS = 1 << 16
"""Of a transposed matrix that are in memory at a time."""


def foreign_tensors(model: LanguageModel, layout: Layout) -> dict[str, Pieces]:
    """The model's file in a layout, adapters merged."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    layers = {f"{name}.weight": layer for name, layer in adapters(model).items()}
    return {
        tensor.name: Pieces(
            weights[tensor.parts[0].parameter].dtype,
            tensor.shape,
            _transposed(tensor, weights, layers) if tensor.transposed else _straight(tensor, weights, layers),
        )
        for tensor in tensor_table(layout, model.config).values()
    }


def _straight(tensor: FileTensor, weights: dict[str, Tensor], layers: dict[str, LoraLinear]) -> Iterator[Tensor]:
    for part in tensor.parts:
        if part.parameter in layers:
            yield from layers[part.parameter].merged_rows(part.first, part.count)
        else:
            yield weights[part.parameter][part.first : part.first + part.count]


def _transposed(tensor: FileTensor, weights: dict[str, Tensor], layers: dict[str, LoraLinear]) -> Iterator[Tensor]:
    inputs, outputs = tensor.shape
    step = max(1, _BLOCK_NUMBERS // outputs)
    for first in range(0, inputs, step):
        count = min(step, inputs - first)
        columns = []
        for part in tensor.parts:
            if part.parameter in layers:
                block = layers[part.parameter].merged_columns(first, count)
            else:
                block = weights[part.parameter][:, first : first + count]
            columns.append(block[part.first : part.first + part.count])
        yield torch.cat(columns).T


def write_adapter(folder: Path, model: LanguageModel, layout: Layout, base_name: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors, as the PEFT library loads them beside the base model.

    A matrix of the file that is several layers of ours (GPT-2's queries, keys and values) gets their adapters as one,
    of the sum of their ranks: B is then zero outside the blocks on its diagonal.
    """
    layers = {f"{name}.weight": layer for name, layer in adapters(model).items()}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for tensor in tensor_table(layout, model.config).values():
        if not any(part.parameter in layers for part in tensor.parts):
            continue
        name = tensor.name.removesuffix(".weight")
        a, b = _adapter(tensor.parts, layers)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        ranks[".".join(name.split(".")[-2:])] = len(a)
    layer = next(iter(layers.values()))
    rank = len(layer.lora_A)
    write_tensors(folder / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
    wider = {name: its_rank for name, its_rank in ranks.items() if its_rank != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": layer.alpha,
        # A wider one has its alpha in proportion: alpha / r stays.
        "rank_pattern": wider,
        "alpha_pattern": {name: layer.scale * its_rank for name, its_rank in wider.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layout == "gpt2",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def _adapter(parts: tuple[Rows, ...], layers: dict[str, LoraLinear]) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) of a tensor of the file."""
    adapted = [layers[part.parameter] for part in parts if part.parameter in layers]
    a = torch.cat([layer.lora_A.detach() for layer in adapted])
    b = a.new_zeros(sum(part.count for part in parts), len(a))
    row = column = 0
    for part in parts:
        if (layer := layers.get(part.parameter)) is not None:
            left = layer.lora_B.detach()[part.first : part.first + part.count]
            b[row : row + part.count, column : column + left.shape[1]] = left
            column += left.shape[1]
        row += part.count
    return a, b
