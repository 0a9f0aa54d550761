"""The environment that a trainer starts with: an allow-list, and the allocator that the plan was made for."""

from __future__ import annotations

import os
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
    "GOMP_SPINCOUNT",  # 0 on a machine that is shared: waiting threads sleep instead of taking a core from others
)
"""What a trainer may inherit. Anything else, the database URL and keys above all, stays with the supervisor."""


def allocator_environment() -> dict[str, str]:
    """glibc settings of the trainer, which the memory model assumes (`slim_core.planning.memory_model`).

    One arena; blocks from 4 MiB on mapped and unmapped one by one, so that they leave no holes; what is smaller stays
    in a heap that is never given back. Smaller mapping thresholds need less memory and take up to twice the time, all
    of it in page faults: a shorter chunk buys the same memory for less (docs/decisions/0003-allocator.md).
    """
    return {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }


def trainer_environment(threads: int, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything in a trainer's (or the calibration's) environment; `threads` bounds its numeric libraries."""
    source = os.environ if inherited is None else inherited
    kept = {name: source[name] for name in ALLOWED if name in source}
    return {
        **kept,
        **allocator_environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
