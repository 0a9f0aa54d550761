"""Feature maps g(.) of linear attention: positive functions of one query or key, row by row.

Legend: B batch, H heads, C positions of a chunk, K head width, M features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slim_core.config import ModelConfig


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
        return nn.functional.elu(x) + 1


class Favor(FeatureMap):
    """FAVOR+ ("Rethinking Attention with Performers", ICLR 2021, lemma 1): an unbiased softmax kernel.

    g(x) = exp(W x' - |x'|^2 / 2) / sqrt(M) with x' = x / K^(1/4) and W of orthogonal rows, (M, K).

    The exponent never exceeds |w|^2 / 2, about K / 2, whatever x is, so keys need no stabiliser: one taken over a chunk
    would make the result depend on the chunking. A query's own maximum is subtracted from it, which cancels in the
    ratio.
    """

    projection: Tensor

    def __init__(self, head_width: int, num_features: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("projection", orthogonal_projection(num_features, head_width, seed))

    def forward(self, x: Tensor, *, is_query: bool) -> Tensor:
        num_features, head_width = self.projection.shape
        x = x * head_width**-0.25
        exponent = x @ self.projection.T - x.square().sum(-1, keepdim=True) / 2
        if is_query:
            exponent = exponent - exponent.detach().amax(-1, keepdim=True)
        return torch.exp(exponent) / math.sqrt(num_features)


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


def make_feature_map(config: ModelConfig, layer: int) -> FeatureMap:
    """The feature map that `config` names. Layers of FAVOR+ draw different projections."""
    match config.feature_map:
        case "squared":
            return Squared()
        case "relu":
            return Relu()
        case "elu1":
            return Elu1()
        case "favor":
            return Favor(config.head_width, config.features_per_head, seed=config.feature_seed * 1_000_003 + layer)
