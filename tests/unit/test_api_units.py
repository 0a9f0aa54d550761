from __future__ import annotations

import pytest

from api.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (1_000, 1_000),
        ("1000", 1_000),
        ("1.5GiB", 1_610_612_736),
        ("800MiB", 838_860_800),
        ("2GB", 2_000_000_000),
        ("2 gb", 2_000_000_000),
        ("1kb", 1_000),
        ("1KiB", 1_024),
        ("0.1MiB", 104_857),
        ("3TiB", 3 * 1024**4),
        ("7b", 7),
        ("999999999999999", 999_999_999_999_999),
        ("999TiB", 999 * 1024**4),
        ("0.001KB", 1),
        ("0.5 GiB", 1 << 29),
    ],
)
def test_sizes_as_people_write_them(text: object, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "1.5 GiBs",
        "-1GiB",
        "1e9",
        "1,5GiB",
        "inf",
        "1..5GB",
        "\u0661GiB",
        "1G",
        "1" * 16,
        "1" * 400,
        "0",
        "0.0GiB",
        "007MiB",
        "1000TiB",
        "1GiB\n",
        1.5,
        True,
        None,
    ],
)
def test_anything_else_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be an integer of bytes or a size"):
        parse_bytes(text)
