"""The two ends of the model: token embedding, and head with its loss. Logits exist for a block of rows at a time.

Legend: R rows (batch times positions), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slim_core.layers.linear import add_weight_gradient, adds_in_place
from slim_core.planning.memory_model import head_block_rows

IGNORED = -100
"""Target of a position that has no loss."""


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.in_place = adds_in_place(weight)
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        rows, grad_rows = tokens.flatten(), grad.flatten(0, -2).to(weight.dtype)
        total = weight.grad if ctx.in_place else torch.zeros_like(weight)
        if total.is_cuda:  # where index_add_ adds in any order and index_put_ sorts
            total.index_put_((rows,), grad_rows, accumulate=True)
        else:
            total.index_add_(0, rows, grad_rows)
        return None, None if ctx.in_place else total


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight`, (V, D), for integers of any shape: (..., D)."""
    return _Embedding.apply(tokens, weight)  # type: ignore[no-untyped-call, no-any-return]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, scale: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        in_place = adds_in_place(weight)
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight and not in_place else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        size = head_block_rows(weight.shape[0])
        for first in range(0, hidden.shape[0], size):
            rows = slice(first, first + size)
            block = hidden[rows]
            loss, grad_logits = block_loss(block @ matrix.T, targets[rows], smoothing, wants_hidden or wants_weight)
            total += loss
            if grad_logits is None:
                continue
            grad_logits = grad_logits.mul_(scale).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, matrix, out=grad_hidden[rows])
            if wants_weight and in_place:
                add_weight_gradient(weight, grad_logits, block)
            elif grad_weight is not None:
                grad_weight += grad_logits.T @ block
            del grad_logits  # before the next block has logits of its own
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total * scale).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None


def block_loss(logits: Tensor, targets: Tensor, smoothing: float, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of the cross-entropies of (R, V) logits, and its gradient, which takes the logits' place."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = logits.log_softmax(-1, dtype=dtype)
    del logits
    vocabulary = log_probabilities.shape[1]
    counts = (targets != IGNORED).to(dtype).unsqueeze(1)
    classes = targets.clamp(min=0).unsqueeze(1)
    loss = -(1 - smoothing) * (log_probabilities.gather(1, classes) * counts).sum(dtype=torch.float64)
    if smoothing:
        all_classes = log_probabilities.sum(1, keepdim=True) * counts
        loss = loss - smoothing / vocabulary * all_classes.sum(dtype=torch.float64)
    if not wants_gradient:
        return loss, None
    gradient = log_probabilities.exp_()
    if smoothing:
        gradient -= smoothing / vocabulary
    gradient.scatter_add_(1, classes, torch.full_like(counts, smoothing - 1))
    return loss, gradient.mul_(counts)


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *, smoothing: float = 0.0, scale: float = 1.0) -> Tensor:
    """Scaled sum of the cross-entropies, in nats, of the logits hidden weight^T.

    Args:
        hidden: (R, D); weight: (V, D); targets: (R,), `IGNORED` where there is no loss.
        smoothing: share of the target's probability spread evenly over the vocabulary (Szegedy et al., CVPR 2016).
        scale: of the result. Gradients are made together with the loss, block by block, so that no (R, V) tensor
            exists: scale here, not afterwards, what is to reach the weights under `gradients_in_place`.
    """
    if not torch.is_grad_enabled():  # a function of its own is told of gradients all the same
        hidden, weight = hidden.detach(), weight.detach()
    return _HeadLoss.apply(hidden, weight, targets, smoothing, scale)  # type: ignore[no-untyped-call, no-any-return]
