"""Bytes and seconds as people read them."""

from __future__ import annotations

BYTES_PER_MIB = 2**20
BYTES_PER_GIB = 2**30


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
