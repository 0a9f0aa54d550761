"""The environment that a trainer starts with: an allow-list, and the allocator that the plan was made for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from service.child_environment import inherited_environment
from slim_core.tensor_heap import THRESHOLD_BYTES, library_path

SPIN_COUNT = 1_000
"""How long threads of trainers that share cores spin for their next piece of work before they sleep (GOMP_SPINCOUNT),
unless the environment says otherwise: one that spins for long takes the core from the others
(docs/decisions/0009-packing-by-bytes.md).
"""


def allocator_environment() -> dict[str, str]:
    """The allocator of the trainer, which the memory model assumes (`slim_core.planning.memory_model`).

    Large tensors are blocks of a heap of their own (`slim_core.tensor_heap`). What else is large is mapped by glibc,
    and so are the tensors where that library was not built; what is small lies in one arena that is never given back
    (docs/decisions/0008-the-tensor-heap.md).
    """
    library = library_path()
    if library is not None and re.search(r"[\s:]", str(library)):
        library = None  # the loader takes these for the end of a path
    # With the heap MKL's own cache of buffers, which keeps every size it ever needed, is not needed.
    heap = {} if library is None else {"LD_PRELOAD": str(library), "MKL_DISABLE_FAST_MM": "1"}
    return {
        **heap,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(THRESHOLD_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }


def preparer_environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything in the environment of what the preparer starts: one thread, and the ordinary allocator with one arena,
    so that its memory is what it needs."""
    source = os.environ if inherited is None else inherited
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    return {**inherited_environment(source), **threads, "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}


def trainer_environment(threads: int, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything in a trainer's (or the calibration's) environment; `threads` bounds its numeric libraries."""
    source = os.environ if inherited is None else inherited
    return {
        **inherited_environment(source),
        **allocator_environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
