"""How pass 2 gets the entry states of chunk n: the two state policies of the SLiM step.

`keep`     pass 1 keeps the entry states of every chunk: memory grows with N, any layer can do it.
`reverse`  (the paper's) pass 1 keeps the last set only; each layer subtracts its chunk's own contribution while pass 2
           recomputes it: memory independent of N, for layers whose state is a plain sum.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from slim_core.model import Chunk, States
from slim_core.planning.plan import StatePolicy


class Entry(NamedTuple):
    """What `forward_chunk` starts from."""

    states: States
    states_are_exit: bool


class StateStore(Protocol):
    """Sees states in the order of pass 1, gives them back in the order of pass 2."""

    def record(self, entry: States) -> None:
        """Pass 1 is about to leave the chunk whose entry states these are."""

    def entry(self) -> Entry:
        """Of the chunk before the one that was asked for last."""

    def visited(self, chunk: Chunk) -> None:
        """Pass 2 has recomputed a chunk."""


class Keep:
    """All entry states, in the precision the model computes in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kept: list[States] = []

    def record(self, entry: States) -> None:
        self._kept.append([state.to(self._dtype) for state in entry])

    def entry(self) -> Entry:
        return Entry([state.double() for state in self._kept.pop()], states_are_exit=False)

    def visited(self, chunk: Chunk) -> None:
        """Nothing to learn from it."""


class Reverse:
    """The states at the border that pass 2 has reached, in float64: thousands of subtractions lose no digits."""

    def __init__(self) -> None:
        self._first: States | None = None
        self._chunks_left = 0
        self._border: States = []

    def record(self, entry: States) -> None:
        self._first = self._first or entry
        self._chunks_left += 1

    def entry(self) -> Entry:
        self._chunks_left -= 1
        if self._chunks_left == 0:
            # Chunk 1 starts from what it really started from, not from a difference that should come to it.
            assert self._first is not None
            return Entry(self._first, states_are_exit=False)
        return Entry(self._border, states_are_exit=True)

    def visited(self, chunk: Chunk) -> None:
        self._border = [state.detach() for state in chunk.entry_states]


def make_store(policy: StatePolicy, dtype: torch.dtype) -> StateStore:
    """The store of a policy, for one pass over one sequence."""
    match policy:
        case "keep":
            return Keep(dtype)
        case "reverse":
            return Reverse()
