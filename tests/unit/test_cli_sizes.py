from __future__ import annotations

import pytest

from cli.sizes import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (37 * 1024, "37 KiB"),
        (612 * 2**20, "612 MiB"),
        (2**30, "1.00 GiB"),
        (1_342_177_280, "1.25 GiB"),
        (64 * 2**30, "64.00 GiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.3401, "340 ms"),
        (0.9996, "1.0 s"),
        (8.24, "8.2 s"),
        (59.96, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3_599.6, "1 h 00 min"),
        (12_000.0, "3 h 20 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
