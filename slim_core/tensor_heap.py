"""The heap of the trainer's tensors (tensor_heap.c): where its library is, and how much it may keep idle.

The library has to be in the process before anything allocates, so it is preloaded (`worker.environment`). It is built
when slimtune is installed, where there is a C compiler; without it the same blocks are mapped by glibc, one by one,
which makes steps slower. No torch here.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

THRESHOLD_BYTES = 64 << 10
"""Tensors from this size on are blocks of the heap; smaller ones are glibc's."""

_NO_LIMIT = ctypes.c_size_t(-1).value


class HeapUse(NamedTuple):
    """Bytes of the heap."""

    mapped: int
    """What the process holds for it, idle blocks among it."""
    live: int
    peak_live: int
    """The most at once since the last reading that restarted it."""


class TensorHeap:
    """The heap of this process."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.tensor_heap_set_limit.argtypes = [ctypes.c_size_t]
        library.tensor_heap_set_limit.restype = None
        library.tensor_heap_read.argtypes = [ctypes.c_size_t * 3, ctypes.c_int]
        library.tensor_heap_read.restype = None

    def set_limit(self, mapped_bytes: int) -> None:
        """Give idle blocks up rather than map more than this. What is in use is not bounded by it."""
        self._library.tensor_heap_set_limit(max(0, mapped_bytes))

    def give_back(self) -> None:
        """Unmap everything that is idle now."""
        self.set_limit(0)
        self.set_limit(_NO_LIMIT)

    def read(self, *, restart: bool = False) -> HeapUse:
        """With `restart` the peak is counted anew from now on."""
        out = (ctypes.c_size_t * 3)()
        self._library.tensor_heap_read(out, restart)
        return HeapUse(*out)


@functools.cache
def tensor_heap() -> TensorHeap | None:
    """The heap, if this process was started with it."""
    library = ctypes.CDLL(None)
    return TensorHeap(library) if hasattr(library, "tensor_heap_set_limit") else None


def library_path() -> Path | None:
    """Where the library is; None if it was not built."""
    folder = Path(__file__).parent
    found = (folder / f"_tensor_heap{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in found if path.exists()), None)
