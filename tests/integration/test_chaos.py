"""A short, seeded `make chaos`: every fault is survived, and every oracle goes red when its guard is taken out."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.embedded import EmbeddedServers
from tests.chaos.arena import Arena
from tests.chaos.fault import Fault
from tests.chaos.table import FAULTS

pytestmark = pytest.mark.slow


@pytest.fixture
def arena(servers: EmbeddedServers, template_database: str, scratch: Path) -> Arena:
    return Arena(servers, template_database, scratch, seed=1, slack=3.0)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_survived(fault: Fault, arena: Arena) -> None:
    assert fault.violations(arena, fault.short) == []


@pytest.mark.parametrize(("fault", "guard"), [pytest.param(f, g, id=f"{f.name}-{g}") for f in FAULTS for g in f.guards])
def test_the_oracle_sees_a_missing_guard(fault: Fault, guard: str, arena: Arena) -> None:
    arena.guard = guard
    arena.patience_seconds = 40.0  # what waits in vain need not wait long, what does not is slow on a busy machine
    assert fault.violations(arena, fault.short, at_most=1) != []
