"""What programs that compute inherit from the processes that start them: an allow-list of the environment."""

from __future__ import annotations

from collections.abc import Mapping

ALLOWED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "TMPDIR",
    "PYTHONDONTWRITEBYTECODE",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "GOMP_SPINCOUNT",
)
"""Anything else, the database URL and keys above all, stays with the parent."""


def inherited_environment(source: Mapping[str, str]) -> dict[str, str]:
    return {name: source[name] for name in ALLOWED if name in source}
