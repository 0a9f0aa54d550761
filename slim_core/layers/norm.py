"""Normalisation over the width, in the precision of the input, with weights of their own.

Legend: R rows (batch times positions), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slim_core.config import ModelConfig


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba, Kiros, Hinton, 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, 2019): neither mean nor bias."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _RmsNorm.apply(x, self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return normed


class _RmsNorm(torch.autograd.Function):
    """Saves x and a scale per row. Computes in float32 at least: of a narrower x one tensor (R, D) of that width exists
    for a while, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scales = norms.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scales, weight)
        return torch.mul(x, scales).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scales, weight = ctx.saved_tensors
        wide = scales.dtype
        products = torch.mul(grad, x) if grad.dtype == wide else grad.to(wide).mul_(x)
        rows = products.flatten(0, -2)
        grad_weight = (rows.mT @ scales.flatten()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # With n = s x, the gradient is s (g w - n mean(g w n)).
        pulls = (rows @ weight.to(wide)).view(scales.shape).mul_(scales.pow(3)).div_(-x.shape[-1])
        grad_x = torch.mul(grad, weight, out=products) if grad.dtype == wide else products.copy_(grad).mul_(weight)
        grad_x.mul_(scales).addcmul_(x.to(wide), pulls)
        return grad_x.to(x.dtype), grad_weight, None


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that `config` names."""
    if config.norm_type == "rms":
        return RmsNorm(config.model_width, config.norm_epsilon)
    return LayerNorm(config.model_width, eps=config.norm_epsilon)
