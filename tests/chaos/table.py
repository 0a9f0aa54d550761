"""All rows of the table."""

from __future__ import annotations

from tests.chaos.fault import Fault
from tests.chaos.processes import PROCESSES

FAULTS: tuple[Fault, ...] = (*PROCESSES,)
