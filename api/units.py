"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

_FACTORS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_NUMBERS = {"": 15, "k": 12, "m": 9, "g": 6, "t": 3}
"""Digits before the point, by the first letter of the unit: what has more is no size of any memory, and may be an
integer that not every reader of JSON has as it is."""
SIZE_PATTERN = (
    r"^(0\.[0-9]{0,2}[1-9][0-9]{0,6} ?[kKmMgGtT][iI]?[bB]|"
    + "|".join(
        rf"[1-9][0-9]{{0,{digits - 1}}}(\.[0-9]{{1,10}})? ?"
        + (f"[{letter}{letter.upper()}][iI]?[bB]" if letter else "[bB]?")
        for letter, digits in _NUMBERS.items()
    )
    + ")$"
)
"""What `parse_bytes` reads of texts, as a regular expression of JSON Schema."""
_ALLOWED = re.compile(SIZE_PATTERN)
_SIZE = re.compile(r"([0-9.]+) ?([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Bytes of an integer or of a text such as `1.5GiB`, `800 MiB` or `2GB`. Raises ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) and _ALLOWED.fullmatch(value) else None
    if match is None:
        raise ValueError('must be an integer of bytes or a size such as "1.5GiB", "800MiB" or "2GB"')
    number, unit = match.groups()
    return int(Decimal(number) * _FACTORS[(unit or "b").lower()])
