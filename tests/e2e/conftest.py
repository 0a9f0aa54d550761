from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def home(scratch: Path) -> Path:
    """One folder for all: each test must leave it fit for another start, which then need not measure the machine."""
    return scratch / "home"
