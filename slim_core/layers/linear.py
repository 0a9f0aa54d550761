"""Matrix products with weights, whose gradients are added in place.

Autograd makes a new gradient the size of the weights for every chunk and then adds it to `.grad`. Here the product
itself adds to `.grad` (`addmm_`, beta = 1), which costs no pass over memory and no second copy: with many short chunks
that is most of the overhead of chunking.

Legend: R rows (batch times positions), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Mode:
    """Whether gradients of weights are added in place: only where the caller of backward is known to want them all."""

    in_place = False


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Inside, a backward pass adds the gradients of weights to their `.grad`, where they have one, by itself.

    For `slim_core.step`, whose backward passes start from the loss with gradient 1 and run once. Elsewhere
    (`torch.autograd.grad`, double backward, hooks on parameters) the ordinary way is the right one.
    """
    before, _Mode.in_place = _Mode.in_place, True
    try:
        yield
    finally:
        _Mode.in_place = before


def adds_in_place(weight: Tensor | None) -> bool:
    """Whether the backward pass of a forward pass that runs now is to add to `weight.grad` by itself."""
    return _Mode.in_place and weight is not None and weight.requires_grad and weight.grad is not None


def add_weight_gradient(weight: Tensor, rows_grad: Tensor, rows: Tensor) -> None:
    """weight.grad += rows_grad^T rows; (O, I) from (R, O) and (R, I)."""
    assert weight.grad is not None
    if weight.grad.dtype == rows.dtype:
        weight.grad.addmm_(rows_grad.mT, rows)
    else:
        weight.grad.add_(rows_grad.mT @ rows)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight, bias)
        ctx.in_place = adds_in_place(weight)
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows_grad = grad.flatten(0, -2)
        grad_weight = grad_bias = None
        if ctx.in_place:
            add_weight_gradient(weight, rows_grad, x.flatten(0, -2))
        elif ctx.needs_input_grad[1]:
            grad_weight = (rows_grad.mT @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows_grad.sum(0, dtype=bias.dtype)
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the precision of x: (..., I), (O, I), (O,) -> (..., O)."""
    return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]


class Linear(nn.Linear):
    """`nn.Linear` in the precision of its input, with weights of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
