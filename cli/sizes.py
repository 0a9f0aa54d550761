"""Bytes and seconds as people read them."""

from __future__ import annotations

import re
from decimal import Decimal

BYTES_PER_MIB = 2**20
BYTES_PER_GIB = 2**30
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": BYTES_PER_MIB, "gib": BYTES_PER_GIB, "tib": 2**40}


def parse_bytes(text: str) -> int:
    """`50GiB`, `1.5 MB`, `1048576`. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text[:40]!r} is no size: give bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    count = int(Decimal(match[1]) * _UNITS[match[2]])
    if not 1 <= count < 2**63:
        raise ValueError("must be at least one byte, and below 2^63")
    return count


def format_bytes(count: int) -> str:
    """Binary units with three digits or so: `37 KiB`, `612 MiB`, `1.25 GiB`."""
    if count < 1024:
        return f"{count} B"
    if count < BYTES_PER_MIB:
        return f"{count / 1024:.0f} KiB"
    if count < BYTES_PER_GIB:
        return f"{count / BYTES_PER_MIB:.0f} MiB"
    return f"{count / BYTES_PER_GIB:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """`340 ms`, `8.2 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
