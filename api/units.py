"""Sizes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

_FACTORS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,10})?) ?([kmgt]i?b|b)?", re.ASCII | re.IGNORECASE)


def parse_bytes(value: object) -> int:
    """Bytes of an integer or of a text such as `1.5GiB`, `800 MiB` or `2GB`. Raises ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError('must be an integer of bytes or a size such as "1.5GiB", "800MiB" or "2GB"')
    number, unit = match.groups()
    return int(Decimal(number) * _FACTORS[(unit or "b").lower()])
