"""Low-rank adapters: the model's own weights stay as they are, a small correction of some of them is trained.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. A layer with weights W computes
W x + alpha / r * B A x. B starts at zero, and so does the correction.

Legend: I inputs, O outputs of a layer, r rank; W (O, I), A (r, I), B (O, r).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slim_core.config import LoraConfig
from slim_core.layers.linear import Linear, linear
from slim_core.model import LanguageModel

_BLOCK_NUMBERS = 1 << 16
"""Weights that are merged at a time: 512 KiB in float64, so that a checkpoint under a tight cap needs little more."""


class LoraLinear(Linear):
    """A linear layer under the names it had before, frozen, with an adapter beside it."""

    def __init__(self, base: Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.alpha = alpha
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
        self.lora_A = nn.Parameter(drawn.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        correction = linear(linear(x, self.lora_A) * self.scale, self.lora_B)
        return linear(x, self.weight, self.bias) + correction

    @torch.no_grad()
    def merged_rows(self, first: int = 0, count: int | None = None) -> Iterator[Tensor]:
        """Rows of W + alpha / r * B A in the precision of W, a few (., I) at a time, computed in float64."""
        rows = max(1, _BLOCK_NUMBERS // self.in_features)
        right = self.lora_A.double()
        last = self.out_features if count is None else first + count
        bases, lefts = torch.split(self.weight[first:last], rows), torch.split(self.lora_B[first:last], rows)
        for base, left in zip(bases, lefts, strict=True):
            yield base.double().addmm_(left.double(), right, alpha=self.scale).to(base.dtype)

    @torch.no_grad()
    def merged_columns(self, first: int, count: int) -> Tensor:
        """Likewise columns, (O, count)."""
        base, right = self.weight[:, first : first + count], self.lora_A[:, first : first + count]
        return base.double().addmm_(self.lora_B.double(), right.double(), alpha=self.scale).to(base.dtype)


def add_adapters(model: LanguageModel, config: LoraConfig, seed: int) -> None:
    """Freeze every parameter and give each target layer an adapter, which is all that is trained from now on.

    A is normal of variance 1 / I, drawn from `seed` and the layer's name: the same whatever the other targets are.
    Raises ValueError where a target is no linear layer of the model's blocks.
    """
    if adapters(model):
        raise ValueError("lora: the model has adapters already")
    layers = {
        name: module for name, module in model.named_modules() if name.startswith("blocks.") and type(module) is Linear
    }
    _check_targets(config.targets, {_attribute(name) for name in layers})
    model.requires_grad_(requires_grad=False)
    for name, base in layers.items():
        if _attribute(name) in config.targets:
            _replace(model, name, LoraLinear(base, config.rank, config.alpha, _seed_of(name, seed)))


def merge_adapters(model: LanguageModel) -> None:
    """Add every adapter to the weights beside it and leave the plain model, all of whose parameters can be trained."""
    for name, layer in adapters(model).items():
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        first = 0
        for rows in layer.merged_rows():
            layer.weight.detach()[first : first + len(rows)] = rows
            first += len(rows)
        _replace(model, name, plain)
    model.requires_grad_(requires_grad=True)


def adapters(model: LanguageModel) -> dict[str, LoraLinear]:
    """The layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _check_targets(targets: tuple[str, ...], existing: set[str]) -> None:
    for target in targets:
        if target == "head":
            raise ValueError("targets: 'head' cannot have an adapter: the loss reads the head's weights directly")
        if target not in existing:
            raise ValueError(f"targets: no linear layer {target!r} in this model; it has {', '.join(sorted(existing))}")


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]


def _replace(model: LanguageModel, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
