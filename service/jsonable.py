"""JSON that PostgreSQL takes: no NaN or infinity, no NUL, no lone surrogates."""

from __future__ import annotations

import math
from typing import Any


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number."""
    return value if value is not None and math.isfinite(value) else None


def clean_text(text: str) -> str:
    """`text` with NUL characters and lone surrogates replaced by U+FFFD: a text column takes neither."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").replace("\0", "\ufffd")


def clean_json(value: Any) -> Any:
    """`value` with every float finite (else None) and every text clean, at any depth."""
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(str(key)): clean_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean_json(item) for item in value]
    return value
