"""How pass 2 gets the entry states of chunk n: the state policies of the SLiM step.

`keep`     pass 1 keeps the entry states of every chunk: memory grows with N, any layer can do it.
`reverse`  (the paper's) pass 1 keeps the last set only; each layer subtracts its chunk's own contribution while pass 2
           recomputes it: memory independent of N, for layers whose state is a plain sum. Where a chunk resets states,
           at the border of a document, the set before it is kept.
`stride`   pass 1 keeps every k-th set; the ones between are recomputed from the nearest, k at a time: memory
           N / k + k, any layer can do it, for one more pass over the states. k = sqrt(N) needs the least.
`prefix`   for layers whose state is a buffer that grows with the sequence and keeps the past as it was: every set is a
           part of the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import torch

from slim_core.model import Chunk, States
from slim_core.planning.plan import StatePolicy

Advance = Callable[[int, States], States]
"""(number of a chunk, its entry states) -> its exit states."""


class Entry(NamedTuple):
    """What `forward_chunk` starts from."""

    states: States
    states_are_exit: bool


class StateStore(Protocol):
    """Sees states in the order of pass 1, gives them back in the order of pass 2."""

    in_graph: ClassVar[bool]
    """Entry states are leaves of autograd's graph; if not, the layers themselves carry gradients over."""

    def record(self, entry: States, *, resets: bool) -> None:
        """Pass 1 is about to leave the chunk whose entry states these are; `resets` if a document begins in it."""

    def entry(self) -> Entry:
        """Of the chunk before the one that was asked for last."""

    def visited(self, chunk: Chunk) -> None:
        """Pass 2 has recomputed a chunk."""


class Keep:
    """All entry states, in the precision that the model computes in."""

    in_graph: ClassVar[bool] = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[States] = []

    def record(self, entry: States, *, resets: bool) -> None:
        self._kept.append([state.to(self._dtype) for state in entry])

    def entry(self) -> Entry:
        return Entry([state.double() for state in self._kept.pop()], states_are_exit=False)

    def visited(self, chunk: Chunk) -> None:
        """Nothing to learn from it."""


class Reverse:
    """The states at the border that pass 2 has reached, in float64: thousands of subtractions lose no digits."""

    in_graph: ClassVar[bool] = True

    def __init__(self) -> None:
        self._chunks_left = 0
        self._kept: dict[int, States] = {}
        self._border: States = []

    def record(self, entry: States, *, resets: bool) -> None:
        # Chunk 1 starts from what it really started from, not from a difference that should come to it.
        if resets or not self._chunks_left:
            self._kept[self._chunks_left] = entry
        self._chunks_left += 1

    def entry(self) -> Entry:
        self._chunks_left -= 1
        if self._chunks_left in self._kept:
            return Entry(self._kept.pop(self._chunks_left), states_are_exit=False)
        return Entry(self._border, states_are_exit=True)

    def visited(self, chunk: Chunk) -> None:
        self._border = [state.detach() for state in chunk.entry_states]


class Stride:
    """Every k-th set of entry states, and those of the k chunks that pass 2 is in."""

    in_graph: ClassVar[bool] = True

    def __init__(self, stride: int, dtype: torch.dtype, advance: Advance) -> None:
        self._stride = stride
        self._dtype = dtype
        self._advance = advance
        self._chunks_left = 0
        self._kept: list[States] = []
        self._between: list[States] = []

    def record(self, entry: States, *, resets: bool) -> None:
        if self._chunks_left % self._stride == 0:
            self._kept.append([state.to(self._dtype) for state in entry])
        self._chunks_left += 1

    def entry(self) -> Entry:
        if not self._between:
            self._recompute()
        self._chunks_left -= 1
        return Entry(self._between.pop(), states_are_exit=False)

    def visited(self, chunk: Chunk) -> None:
        """Nothing to learn from it."""

    @torch.no_grad()
    def _recompute(self) -> None:
        states = [state.double() for state in self._kept.pop()]
        self._between = [states]
        for number in range(len(self._kept) * self._stride, self._chunks_left - 1):
            states = self._advance(number, states)
            self._between.append(states)


class Prefix:
    """The one set that there is."""

    in_graph: ClassVar[bool] = False

    def __init__(self) -> None:
        self._states: States = []

    def record(self, entry: States, *, resets: bool) -> None:
        self._states = entry

    def entry(self) -> Entry:
        return Entry(self._states, states_are_exit=False)

    def visited(self, chunk: Chunk) -> None:
        """Nothing to learn from it."""


def make_store(policy: StatePolicy, dtype: torch.dtype, stride: int, advance: Advance) -> StateStore:
    """The store of a policy, for one pass over one sequence."""
    match policy:
        case "keep":
            return Keep(dtype)
        case "reverse":
            return Reverse()
        case "stride":
            return Stride(stride, dtype, advance)
        case "prefix":
            return Prefix()
