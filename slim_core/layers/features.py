"""Feature maps g(.) of linear attention: positive functions of one query or key, row by row.

Legend: B batch, H heads, C positions of a chunk, K head width, M features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slim_core.config import CUSTOM_FEATURE_MAPS, FEATURE_MAPS, ModelConfig


class FeatureMap(nn.Module):
    """g: (..., K) -> (..., M), non-negative. Each row on its own, so the result cannot depend on the chunking."""

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        raise NotImplementedError


class Squared(FeatureMap):
    """g(x) = x^2 elementwise, the map of the paper's experiments (SLiM, section 4); M = K."""

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        return x * x


RELU_OFFSET = 1e-3
"""Added to ReLU features, as Performer-ReLU does: a query that meets only zeros would divide by the epsilon alone,
and every rounding error of the state would be multiplied by its inverse."""


class Relu(FeatureMap):
    """g(x) = max(x, 0) + 1e-3, the Performer-ReLU of "Rethinking Attention with Performers"; M = K."""

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        return torch.relu(x) + RELU_OFFSET


class Elu1(FeatureMap):
    """g(x) = elu(x) + 1 (Katharopoulos et al., "Transformers are RNNs", ICML 2020); M = K."""

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        features: Tensor = _Elu1.apply(x)  # type: ignore[no-untyped-call]
        return features


class _Elu1(torch.autograd.Function):
    """x + 1 above zero and exp(x) below, where elu(x) is so close to -1 that adding 1 would leave no digits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > 0, x + 1, x.exp())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x: Tensor = grad * x.clamp(max=0).exp_()
        return grad_x


class Favor(FeatureMap):
    """FAVOR+ ("Rethinking Attention with Performers", ICLR 2021, lemma 1): an unbiased softmax kernel.

    g(x) = exp(W x' - |x'|^2 / 2) / sqrt(M) with x' = x / K^(1/4) and W of orthogonal rows, (M, K).

    The exponent never exceeds |w|^2 / 2, about K / 2, whatever x is, so keys need no stabiliser: one taken over a chunk
    would make the result depend on the chunking. A query's own maximum is subtracted from it, which cancels in the
    ratio but for the normaliser's epsilon; backward takes it as a constant.
    """

    projection: Tensor

    def __init__(self, head_width: int, num_features: int, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._drawing: int | None = None  # the weights that are loaded later bring a projection of their own
        self.register_buffer("projection", orthogonal_projection(num_features, head_width, seed))

    def redraw(self, drawing: int) -> None:
        """Take projection number `drawing` of the sequence that the seed defines; number 0 is the first one."""
        if drawing != self._drawing:
            num_features, head_width = self.projection.shape
            self.projection.copy_(orthogonal_projection(num_features, head_width, self._seed + drawing * _NEXT_DRAWING))
            self._drawing = drawing

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        num_features, head_width = self.projection.shape
        dtype = x.dtype
        x = x.to(self.projection.dtype) * head_width**-0.25
        exponent = x @ self.projection.T - x.square().sum(-1, keepdim=True) / 2
        if is_query:
            exponent = exponent - exponent.detach().amax(-1, keepdim=True)
        return (torch.exp(exponent) / math.sqrt(num_features)).to(dtype)


_NEXT_DRAWING = 1_000_000_007
"""Between the seeds of two drawings: larger than any layer's distance from another."""


def orthogonal_projection(num_features: int, head_width: int, seed: int) -> Tensor:
    """(M, K) float32: blocks of orthogonal rows whose norms are those of Gaussian vectors; the same for the same
    seed."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(num_features / head_width)):
        gaussian = torch.randn(head_width, head_width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        blocks.append((q * r.diagonal().sign()).T)  # uniform over rotations only with these signs (Mezzadri, 2007)
    rows = torch.cat(blocks)[:num_features]
    norms = torch.randn(num_features, head_width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    projection: Tensor = (rows * norms).float()
    return projection


FeatureMapFactory = Callable[[ModelConfig, int], FeatureMap]
"""(config, number of the layer) -> its feature map, from K to `config.features_per_head` numbers."""

_factories: dict[str, FeatureMapFactory] = {}


def register_feature_map(name: str, factory: FeatureMapFactory) -> None:
    """Let `ModelConfig.feature_map` name a feature map of your own.

    Register it before a config, or a checkpoint that names it, is made or read. Its rows must not depend on each other:
    chunks would then change the result. Raises ValueError for a name that is taken.
    """
    if name in FEATURE_MAPS or name in _factories:
        raise ValueError(f"feature_map: there is one named {name!r} already")
    _factories[name] = factory
    CUSTOM_FEATURE_MAPS.add(name)


def make_feature_map(config: ModelConfig, layer: int) -> FeatureMap:
    """The feature map that `config` names. Layers of FAVOR+ draw different projections."""
    if config.feature_map in _factories:
        return _factories[config.feature_map](config, layer)
    match config.feature_map:
        case "squared":
            return Squared()
        case "relu":
            return Relu()
        case "elu1":
            return Elu1()
        case "favor":
            return Favor(config.head_width, config.features_per_head, seed=config.feature_seed * 1_000_003 + layer)
        case unknown:
            raise ValueError(f"feature_map: {unknown!r} is not registered")
