"""The meter and the cap: what the trainer process holds, and the limit that makes it fail before it holds more.

Everything that differs between devices lives here. On a CPU the measure is private memory (RssAnon of
proc_pid_status(5)) and the limit RLIMIT_DATA (setrlimit(2)); on a GPU it is everything the process holds there,
limited by the caching allocator.
"""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Protocol

import torch

from slim_core.tensor_heap import tensor_heap

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_REFUSED = re.compile(
    "can't allocate memory|Cannot allocate memory|not enough memory|bad_alloc"
    "|could not create a primitive"  # oneDNN's word for it
)
_RESET_PEAK_RSS = "5"  # proc_pid_clear_refs(5)


_FIRST_RESERVE_BYTES, _RESERVE_BYTES = 12 << 20, 3 << 20
"""Of the planned peak, for what grows outside the heap of tensors in the first step, and between two later readings."""


_UNCOUNTED_BYTES = 256 << 10
"""Private memory that RLIMIT_DATA does not count: the stack, pages of libraries that were written to."""


class MemoryMeter(Protocol):
    """Peak memory of this process on its device, from the meter's creation on."""

    def peak_bytes(self) -> int:
        """The largest amount held at any time so far, all of the process included. Call at least once a step."""

    def forget_files(self) -> None:
        """Files were mapped and read since the last reading, whose pages it would take for the process's own: of what
        was held until now only what is still held counts."""

    def enforce_cap(self, cap_bytes: int) -> None:
        """From now on allocations that would exceed the cap fail. Call after the warm-up."""

    def keep_within(self, planned_bytes: int) -> None:
        """Memory that is not in use is given back rather than that the process grows beyond the planned peak."""


class CpuMeter:
    """Peak of private resident memory, from the kernel's own high-water mark: nothing can slip between samples.

    The kernel keeps a peak of all resident memory (VmHWM), files and anonymous together. It is started afresh at every
    reading: mapped files change little between two of them, so the private peak is at most VmHWM less the smaller of
    the file-backed parts at both.
    """

    def __init__(self) -> None:
        self._peak_bytes = 0
        self._file_bytes = 0
        self._planned_bytes: int | None = None
        self._restart(_status())

    def _restart(self, status: dict[str, int]) -> None:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
        self._file_bytes = _shared_bytes(status)

    def peak_bytes(self) -> int:
        status = _status()
        file_bytes = min(self._file_bytes, _shared_bytes(status))
        self._peak_bytes = max(self._peak_bytes, status["VmHWM"] - file_bytes, status["RssAnon"])
        self._restart(status)
        self._limit_heap(status, _RESERVE_BYTES)
        return self._peak_bytes

    def forget_files(self) -> None:
        status = _status()
        self._peak_bytes = max(self._peak_bytes, status["RssAnon"])
        self._restart(status)

    def enforce_cap(self, cap_bytes: int) -> None:
        """RLIMIT_DATA counts reserved private memory, touched or not (thread stacks above all): the part that is
        reserved and untouched now is granted on top of the cap.
        """
        status = _status()
        limit = cap_bytes + status["VmData"] - status["RssAnon"] - _UNCOUNTED_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def keep_within(self, planned_bytes: int) -> None:
        self._planned_bytes = planned_bytes
        self._limit_heap(_status(), _FIRST_RESERVE_BYTES)

    def _limit_heap(self, status: dict[str, int], reserve_bytes: int) -> None:
        """What the heap of tensors may map: the plan less what else the process holds, which only grows."""
        heap = tensor_heap()
        if heap is not None and self._planned_bytes is not None:
            beside_bytes = status["RssAnon"] - heap.read().mapped
            heap.set_limit(self._planned_bytes - beside_bytes - reserve_bytes)


class CudaMeter:
    """Peak of all the device memory of this process: the allocator's reserved bytes and the measured CUDA context."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
        # Other processes on the device would be counted too: an upper bound, which is the safe side.
        self._context_bytes = total - free - torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int:
        return self._context_bytes + torch.cuda.max_memory_reserved(self._device)

    def forget_files(self) -> None:
        """Nothing: files are never on the device."""

    def enforce_cap(self, cap_bytes: int) -> None:
        total = torch.cuda.get_device_properties(self._device).total_memory
        fraction = (cap_bytes - self._context_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(max(fraction, 0.0), 1.0), self._device)

    def keep_within(self, planned_bytes: int) -> None:
        """Nothing: torch's allocator gives its idle blocks back by itself when it reaches the cap."""


def pick_device() -> torch.device:
    """The first GPU, where torch sees one; else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def make_meter(device: torch.device) -> MemoryMeter:
    """The meter of a device."""
    return CudaMeter(device) if device.type == "cuda" else CpuMeter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused. On a CPU torch raises a RuntimeError that only its text tells from others."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(_REFUSED.search(str(error)))


def private_bytes() -> int:
    """Private resident memory of this process now (RssAnon)."""
    return _status()["RssAnon"]


def _status() -> dict[str, int]:
    """The `... kB` lines of /proc/self/status, in bytes."""
    return {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    }


def _shared_bytes(status: dict[str, int]) -> int:
    return status["RssFile"] + status["RssShmem"]
