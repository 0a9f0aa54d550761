from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.mark.parametrize(("heartbeat", "self_kill", "lease"), [(60, 60, 90), (5, 90, 90), (5, 100, 90), (5, 60, inf)])
def test_a_lease_that_may_pass_to_another_while_the_run_goes_on_is_refused(
    heartbeat: float, self_kill: float, lease: float
) -> None:
    with pytest.raises(ValidationError, match=r"SLIMTUNE_SELF_KILL_SECONDS|finite"):
        Settings(
            database_url="postgresql://",
            redis_url="redis://",
            data_dir=Path("/nowhere"),
            heartbeat_seconds=heartbeat,
            self_kill_seconds=self_kill,
            lease_seconds=lease,
        )


@pytest.mark.parametrize(
    "url", ["bucket", "s3://", "gs://bucket", "https://host/bucket", "file://host/folder", "file:///"]
)
def test_a_place_for_files_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="must be s3://bucket/prefix"):
        Settings(database_url="postgresql://", redis_url="redis://", data_dir=Path("/nowhere"), storage_url=url)
