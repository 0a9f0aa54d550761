"""The SLiM step: exact loss and gradients of a long sequence from two passes over its chunks.

Source: "Sub-Linear Memory: How to Make Performers SLiM", Algorithm 1. Two changes make it cheaper at no loss: pass 1
computes states only (no loss, and in the last layer neither queries nor MLP) and never visits the last chunk. With
one chunk this is the ordinary training step. The loop knows no kind of attention; it sees `forward_chunk`, `advance`
and states.

Legend: B batch, T positions of the sequence, C of a chunk, N = ceil(T / C) chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, get_args

import torch
from torch import Tensor

from slim_core.layers.documents import positions_in_documents
from slim_core.layers.dropout import NO_DROPOUT, Dropout
from slim_core.layers.head import IGNORED
from slim_core.layers.linear import gradients_in_place
from slim_core.model import Chunk, Documents, States
from slim_core.planning.memory_model import default_stride
from slim_core.planning.plan import StatePolicy
from slim_core.states import Entry, make_store


class ChunkedModel(Protocol):
    """All that the step knows of a model (`slim_core.model.LanguageModel` says what each does)."""

    @property
    def policies(self) -> tuple[StatePolicy, ...]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def initial_states(self, batch: int, length: int) -> States: ...

    def forward_chunk(
        self,
        tokens: Tensor,
        start: int,
        states: States,
        *,
        states_are_exit: bool = ...,
        documents: Documents | None = ...,
        dropout: Dropout = ...,
    ) -> Chunk: ...

    def advance(
        self, tokens: Tensor, start: int, states: States, *, documents: Documents | None = ..., dropout: Dropout = ...
    ) -> States: ...

    def loss(self, hidden: Tensor, targets: Tensor, *, scale: float = ..., label_smoothing: float = ...) -> Tensor: ...


def slim_step(
    model: ChunkedModel,
    tokens: Tensor,
    targets: Tensor,
    *,
    chunk_length: int,
    state_policy: StatePolicy,
    normaliser: int,
    weight: float = 1.0,
    stride: int | None = None,
    document_starts: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    label_smoothing: float = 0.0,
    between_chunks: Callable[[], None] = lambda: None,
) -> float:
    """Add the gradient of the mean loss to every parameter's `.grad`; peak memory depends on C, not on T.

    Where a parameter has a `.grad` already, products with the weights add to it in place: no second copy of a
    gradient ever exists.

    Args:
        tokens, targets: (B, T) integers of any kind; `IGNORED` targets have no loss. Shorter sequences are padded on
            the right, with any token and `IGNORED` targets.
        chunk_length: C, from 1 up; C >= T is the ordinary full step.
        state_policy: how pass 2 finds the entry states of a chunk (`slim_core.states`); changes no result.
        normaliser: number of targets with a loss in the whole optimiser step, micro-batches together.
        weight: of the loss in the gradient; -1 takes away what an equal step added, in the memory of one gradient.
        stride: k of the policy `stride`; None for about sqrt(N).
        document_starts: (B, T) booleans, true where a document begins: attention never crosses such a border and
            positions count from it. None for one document a row.
        dropout: masks of this optimiser step, the same under every plan.
        label_smoothing: share of the target's probability spread over the vocabulary.
        between_chunks: called before every chunk; may raise to give up the step, whose gradients are then incomplete.

    Returns:
        This call's share of the mean loss, in nats per token.

    Raises:
        ValueError: the model's attention does not work with this policy; a target is neither a token nor `IGNORED`.
    """
    spans = ChunkSpans(tokens.shape[1], chunk_length)
    _check_policy(model, state_policy, len(spans), stride)
    _check_targets(targets, normaliser)
    documents = _Documents(document_starts)

    def advance(number: int, states: States) -> States:
        between_chunks()
        span = spans[number]
        return model.advance(tokens[:, span].long(), span.start, states, documents=documents.of(span), dropout=dropout)

    dtype = next(model.parameters()).dtype
    store = make_store(state_policy, dtype, stride or default_stride(len(spans)), advance)
    states = model.initial_states(*tokens.shape)
    with torch.no_grad():
        for number in range(len(spans) - 1):
            store.record(states, resets=documents.begin_in(spans[number]))
            states = advance(number, states)

    loss = 0.0
    entry = Entry(states, states_are_exit=False)
    del states  # here and below: a set of states that nothing reads any more would lie beside the next chunk's
    exit_grads: list[Tensor | None] | None = None
    for span in reversed(spans):
        if exit_grads is not None:
            entry = store.entry()
        between_chunks()
        if store.in_graph and not entry.states_are_exit and span.start > 0:
            entry = Entry([state.requires_grad_() for state in entry.states], states_are_exit=False)
        with gradients_in_place():
            chunk = model.forward_chunk(
                tokens[:, span].long(),
                span.start,
                entry.states,
                states_are_exit=entry.states_are_exit,
                documents=documents.of(span),
                dropout=dropout,
            )
            chunk_loss = model.loss(
                chunk.hidden, targets[:, span].long(), scale=weight / normaliser, label_smoothing=label_smoothing
            )
        store.visited(chunk)
        entry_states, exit_states = chunk.entry_states, chunk.exit_states
        del chunk, entry  # what the head has read is not needed for its gradient, which exists already
        loss += chunk_loss.item() / weight
        _backward(chunk_loss, exit_states, exit_grads)
        exit_grads = [state.grad for state in entry_states]
        del chunk_loss, entry_states, exit_states
    return loss


def _backward(chunk_loss: Tensor, exit_states: States, exit_grads: list[Tensor | None] | None) -> None:
    """Of loss_n + <exit states, G_n>; the last chunk has no G."""
    # Below the lowest trained layer nothing depends on a trained weight, and no state has a gradient.
    pairs = [p for p in zip(exit_states, exit_grads or [], strict=exit_grads is not None) if p[0].requires_grad]
    torch.autograd.backward([chunk_loss, *(s for s, _ in pairs)], [None, *(g for _, g in pairs)])


def _check_policy(model: ChunkedModel, policy: StatePolicy, num_chunks: int, stride: int | None) -> None:
    if policy not in (known := get_args(StatePolicy)):
        raise ValueError(f"state_policy: must be one of {', '.join(known)}")
    if stride is not None and stride < 1:
        raise ValueError(f"stride: must be at least 1, got {stride}")
    if num_chunks == 1 or policy in model.policies:
        return
    if not model.policies:
        raise ValueError("chunk_length: this model's attention needs the whole sequence in one chunk")
    raise ValueError(f"state_policy: this model's attention allows {' and '.join(model.policies)}, not {policy}")


def _check_targets(targets: Tensor, normaliser: int) -> None:
    if normaliser < 1:
        raise ValueError("normaliser: must be at least 1; a step whose targets are all ignored has no loss")
    # A gather would take any other negative number for token 0.
    if int(targets.min()) < 0 and bool(((targets < 0) & (targets != IGNORED)).any()):
        raise ValueError(f"targets: must be tokens, or {IGNORED} where there is no loss")


class _Documents:
    """The borders of documents, cut into chunks."""

    def __init__(self, starts: Tensor | None) -> None:
        self._starts = starts
        self._positions = None if starts is None else positions_in_documents(starts)

    def begin_in(self, span: slice) -> bool:
        return self._starts is not None and bool(self._starts[:, span].any())

    def of(self, span: slice) -> Documents | None:
        if self._starts is None or self._positions is None:
            return None
        starts = self._starts[:, span]
        return Documents(starts if self.begin_in(span) else None, self._positions[:, span].long())


@torch.no_grad()
def evaluate_loss(
    model: ChunkedModel,
    tokens: Tensor,
    targets: Tensor,
    *,
    chunk_length: int,
    document_starts: Tensor | None = None,
    between_chunks: Callable[[], None] = lambda: None,
) -> float:
    """Sum of the cross-entropies of (B, T) tokens in nats, chunk by chunk; less memory than a training step at the
    same C. `between_chunks` may raise to give it up."""
    documents = _Documents(document_starts)
    states = model.initial_states(*tokens.shape)
    loss = 0.0
    for span in ChunkSpans(tokens.shape[1], chunk_length):
        between_chunks()
        chunk = model.forward_chunk(tokens[:, span].long(), span.start, states, documents=documents.of(span))
        loss += model.loss(chunk.hidden, targets[:, span].long()).item()
        states = chunk.exit_states
    return loss


def count_targets(targets: Tensor) -> int:
    """Targets that have a loss."""
    return int((targets != IGNORED).sum())


class ChunkSpans(Sequence[slice]):
    """Slices of `chunk_length` positions; the last one holds what is left. Takes no memory, however many there are."""

    def __init__(self, length: int, chunk_length: int) -> None:
        if chunk_length < 1:
            raise ValueError(f"chunk_length: must be at least 1, got {chunk_length}")
        self._starts = range(0, length, chunk_length)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> slice:  # type: ignore[override]  # one at a time is all that is needed
        start = self._starts[number]
        return slice(start, min(start + self._starts.step, self._starts.stop))
