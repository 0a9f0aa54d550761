from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.scripted_service import Script, scripted


@pytest.fixture
def script() -> Iterator[Script]:
    """A server for one test, which answers nothing yet."""
    with scripted() as script:
        yield script
