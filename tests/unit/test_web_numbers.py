"""Numbers as pages show them."""

from __future__ import annotations

import pytest

from api.web.pages import shown_bytes, shown_ratio


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "0.977 KiB"),
        (int(999.4 * 2**20), "999 MiB"),
        (int(999.6 * 2**20), "0.976 GiB"),  # not 1e+03 MiB
        (1536 << 20, "1.5 GiB"),
        (-(2 << 30), "-2 GiB"),
        (None, "\N{EN DASH}"),
    ],
)
def test_sizes_have_three_digits_and_no_exponent(count: int | None, shown: str) -> None:
    assert shown_bytes(count) == shown


def test_ratios_have_no_exponent() -> None:
    assert [shown_ratio(each) for each in (0.354, 2.14, 99.4, 99.6, 123.4, 4321.0)] == [
        "0.35", "2.1", "99", "100", "123", "4,321"
    ]  # fmt: skip
