from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def home(scratch: Path, calibrated: Callable[[Path], None]) -> Path:
    """One folder for all: each test must leave it fit for another start. The machine has been measured there."""
    folder = scratch / "home"
    calibrated(folder)
    return folder
