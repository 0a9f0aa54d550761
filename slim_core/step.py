"""The SLiM step: exact loss and gradients of a long sequence from two passes over its chunks.

Source: "Sub-Linear Memory: How to Make Performers SLiM", Algorithm 1. Two changes make it cheaper at no loss: pass 1
computes states only (no loss, and in the last layer neither queries nor MLP) and never visits the last chunk. With
one chunk this is the ordinary training step. The loop knows no kind of attention; it sees `forward_chunk`, `advance`
and states.

Legend: B batch, T positions of the sequence, C of a chunk, N = ceil(T / C) chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slim_core.model import IGNORED, Performer
from slim_core.planning.plan import StatePolicy
from slim_core.states import Entry, make_store


def slim_step(
    model: Performer,
    tokens: Tensor,
    targets: Tensor,
    *,
    chunk_length: int,
    state_policy: StatePolicy,
    normaliser: int,
    between_chunks: Callable[[], None] = lambda: None,
) -> float:
    """Add the gradient of the mean loss to every parameter's `.grad`; peak memory depends on C, not on T.

    Args:
        tokens, targets: (B, T) integers of any kind; `IGNORED` targets have no loss.
        chunk_length: C, from 1 up; C >= T is the ordinary full step.
        state_policy: how pass 2 finds the entry states of a chunk (`slim_core.states`); changes no result.
        normaliser: number of targets with a loss in the whole optimiser step, micro-batches together.
        between_chunks: called before every chunk; may raise to give up the step, whose gradients are then incomplete.

    Returns:
        This call's share of the mean loss, in nats per token.
    """
    spans = list(chunk_spans(tokens.shape[1], chunk_length))
    store = make_store(state_policy, next(model.parameters()).dtype)
    states = model.initial_states(tokens.shape[0])
    with torch.no_grad():
        for span in spans[:-1]:
            between_chunks()
            store.record(states)
            states = model.advance(tokens[:, span].long(), span.start, states)

    loss = 0.0
    entry = Entry(states, states_are_exit=False)
    exit_grads: list[Tensor] | None = None
    for span in reversed(spans):
        between_chunks()
        if exit_grads is not None:
            entry = store.entry()
        if not entry.states_are_exit and span.start > 0:
            entry = Entry([state.requires_grad_() for state in entry.states], states_are_exit=False)
        chunk = model.forward_chunk(
            tokens[:, span].long(), span.start, entry.states, states_are_exit=entry.states_are_exit
        )
        store.visited(chunk)
        chunk_loss = model.loss_sum(chunk.hidden, targets[:, span].long()) / normaliser
        loss += chunk_loss.item()
        if exit_grads is None:
            chunk_loss.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward([chunk_loss, *chunk.exit_states], [None, *exit_grads])
        exit_grads = [state.grad for state in chunk.entry_states if state.grad is not None]
    return loss


@torch.no_grad()
def evaluate_loss(model: Performer, tokens: Tensor, targets: Tensor, *, chunk_length: int) -> float:
    """Sum of the cross-entropies of (B, T) tokens in nats, chunk by chunk; less memory than a training step at the
    same C."""
    states = model.initial_states(tokens.shape[0])
    loss = 0.0
    for span in chunk_spans(tokens.shape[1], chunk_length):
        chunk = model.forward_chunk(tokens[:, span].long(), span.start, states)
        loss += model.loss_sum(chunk.hidden, targets[:, span].long()).item()
        states = chunk.exit_states
    return loss


def count_targets(targets: Tensor) -> int:
    """Targets that have a loss."""
    return int((targets != IGNORED).sum())


def chunk_spans(length: int, chunk_length: int) -> Iterator[slice]:
    """Slices of `chunk_length` positions; the last one holds what is left."""
    if chunk_length < 1:
        raise ValueError(f"chunk_length: must be at least 1, got {chunk_length}")
    for start in range(0, length, chunk_length):
        yield slice(start, min(start + chunk_length, length))
