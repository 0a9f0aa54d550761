"""What a row of the reliability table is here: a fault, how often it is inflicted, and the oracle that watches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.chaos.arena import Arena

Inflict = Callable[[Arena, int], Iterator[str]]
"""Inflicts the fault so many times and yields what was violated, a sentence each."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table in docs/reliability.md."""

    name: str
    """What is hit."""
    title: str
    """What is done to it, and what must come of it."""
    unit: str
    """What is counted."""
    full: int
    """How many `make chaos` does ..."""
    short: int
    """... and how many the tests do."""
    inflict: Inflict
    guards: tuple[str, ...] = ()
    """Names in tests/chaos/guards.py: without any one of these the oracle must find a violation."""

    def violations(self, arena: Arena, cycles: int, at_most: int | None = None) -> list[str]:
        """What went wrong; `at_most` so many. What a fault waits for and does not come is a violation, its last one."""
        found: list[str] = []
        try:
            found.extend(itertools.islice(self.inflict(arena, cycles), at_most))
        except AssertionError as error:
            found.append(str(error).splitlines()[0])
        return found
