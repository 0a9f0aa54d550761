"""Identifiers: a prefix that names the kind, and a UUIDv7 in hex, so that text order is order of creation."""

from __future__ import annotations

import re
import secrets
import threading
import time
from typing import Literal
from uuid import UUID

Prefix = Literal["ds", "evt", "job", "key", "model", "part", "req", "tok", "upload", "wh"]


class _Clock:
    """Milliseconds since 1970 times 4096, strictly increasing in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def tick(self) -> int:
        with self._lock:
            self._last = max((time.time_ns() << 12) // 1_000_000, self._last + 1)
            return self._last


_clock = _Clock()


def uuid7() -> UUID:
    """A UUIDv7 (RFC 9562, method 3: 12 bits of the millisecond's fraction), strictly increasing in this process."""
    tick = _clock.tick()
    milliseconds, fraction = tick >> 12, tick & 0xFFF
    return UUID(int=milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | secrets.randbits(62))


def new_id(prefix: Prefix) -> str:
    """A new identifier such as `job_01936f...` (32 hex digits)."""
    return f"{prefix}_{uuid7().hex}"


def is_id(prefix: Prefix, text: str) -> bool:
    """Whether `text` can be an identifier of this kind at all: what cannot never reaches the database."""
    return re.fullmatch(rf"{prefix}_[0-9a-f]{{32}}", text) is not None
