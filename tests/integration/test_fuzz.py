"""The API against whatever is sent to it, a little of it; `make fuzz` sends much more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.contract import conform
from tests.fuzz.live import live_api

SEED = 1


@pytest.mark.slow
def test_the_api_does_as_its_document_says(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with live_api(database_url, redis_url, tmp_path) as api:
        verdict = conform(api, tmp_path, SEED, examples=3, max_seconds=60)
    assert verdict.failures == [], verdict.output
    assert verdict.cases > 200
