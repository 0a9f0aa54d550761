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
    ("address", "token", "allowed"),
    [
        ("127.0.0.1:9101", None, True),
        ("[::1]:9101", None, True),
        ("localhost:9101", None, True),
        ("10.1.2.3:9101", None, True),
        ("", None, True),
        ("0.0.0.0:9101", None, False),
        ("[::]:9101", None, False),
        ("8.8.8.8:9101", None, False),
        ("worker.example:9101", None, False),
        ("0.0.0.0:9101", "secret", True),
        ("9101", "secret", False),
        (":9101", "secret", False),
        ("::1:9101", "secret", False),
        ("127.0.0.1:99999", "secret", False),
    ],
)
def test_a_workers_numbers_are_for_a_private_network_or_have_a_token(
    address: str, token: str | None, allowed: bool
) -> None:
    fields = {"database_url": "postgresql://", "redis_url": "redis://", "data_dir": "/nowhere"}
    fields |= {"worker_metrics_address": address} | ({"metrics_token": token} if token else {})
    if allowed:
        assert Settings.model_validate(fields).worker_metrics_address == (address or None)
    else:
        with pytest.raises(ValidationError):
            Settings.model_validate(fields)


@pytest.mark.parametrize(
    "url", ["bucket", "s3://", "gs://bucket", "https://host/bucket", "file://host/folder", "file:///"]
)
def test_a_place_for_files_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="must be s3://bucket/prefix"):
        Settings(database_url="postgresql://", redis_url="redis://", data_dir=Path("/nowhere"), storage_url=url)
