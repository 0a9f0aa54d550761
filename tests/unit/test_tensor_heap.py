"""The heap of tensors, in processes that it is preloaded into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slim_core.tensor_heap import THRESHOLD_BYTES, library_path, tensor_heap
from worker import environment

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

PRELUDE = """
import ctypes, json, random, resource, threading
from slim_core.tensor_heap import THRESHOLD_BYTES, tensor_heap

MIB = 2**20
heap = tensor_heap()
libc = ctypes.CDLL(None)
for name, result, arguments in [
    ("malloc", ctypes.c_void_p, [ctypes.c_size_t]),
    ("realloc", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    ("reallocarray", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ("posix_memalign", ctypes.c_int, [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]),
    ("malloc_usable_size", ctypes.c_size_t, [ctypes.c_void_p]),
    ("free", None, [ctypes.c_void_p]),
]:
    getattr(libc, name).restype, getattr(libc, name).argtypes = result, arguments

def aligned(size, alignment=64):
    out = ctypes.c_void_p()
    code = libc.posix_memalign(ctypes.byref(out), alignment, size)
    return code, out.value

heap.give_back()
before = heap.read(restart=True)
"""

pytestmark = pytest.mark.skipif(library_path() is None, reason="built without a C compiler")


def child(program: str) -> Any:
    """What a program of its own, with the heap, prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program],
        cwd=ROOT,
        env=environment.trainer_environment(threads=1) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_this_process_has_none() -> None:
    assert tensor_heap() is None


def test_a_freed_block_is_the_next_one_of_its_size() -> None:
    found = child("""
_, first = aligned(10 * MIB)
libc.free(first)
idle = heap.read()
_, second = aligned(10 * MIB)
_, small = aligned(THRESHOLD_BYTES - 1)
use = heap.read()
heap.give_back()
after = heap.read()
print(json.dumps([first == second, idle.mapped - before.mapped, idle.live - before.live, use.mapped - before.mapped,
    use.live - before.live, use.peak_live - before.live, after.mapped - before.mapped]))
""")
    assert found == [True, 10 * MIB, 0, 10 * MIB, 10 * MIB, 10 * MIB, 10 * MIB]


WORKOUT = """
source = random.Random({seed})
held, broken, above, limit = {{}}, 0, 0, None
for step in range(4000):
    if held and source.random() < 0.5:
        address, (size, mark) = held.popitem() if source.random() < 0.5 else next(iter(held.items()))
        held.pop(address, None)
        bytes_ = (ctypes.c_char * size).from_address(address)
        broken += bytes_[0] != mark or bytes_[size - 1] != mark or bytes_[size // 2] != mark
        libc.free(address)
    else:
        size = int(THRESHOLD_BYTES * 2 ** source.uniform(0, 8))
        if sum(size for size, _ in held.values()) + size > 100 * MIB:
            continue
        code, address = aligned(size) if source.random() < 0.5 else (0, libc.malloc(size))
        assert code == 0 and address % 64 == 0 and address not in held
        mark = bytes([step % 256])
        bytes_ = (ctypes.c_char * size).from_address(address)
        bytes_[0] = bytes_[size - 1] = bytes_[size // 2] = mark
        assert libc.malloc_usable_size(address) >= size
        held[address] = (size, mark)
    if step % 500 == 0:
        limit = before.mapped + source.choice([0, 20, 60, 120, 200]) * MIB
        heap.set_limit(limit)
    use = heap.read()
    above += limit is not None and use.mapped > max(limit, use.live)
ordered = sorted((address, size) for address, (size, _) in held.items())
overlaps = sum(a + size > b for (a, size), (b, _) in zip(ordered, ordered[1:]))
for address in held:
    libc.free(address)
heap.give_back()
print(json.dumps([broken, above, overlaps, heap.read().mapped - before.mapped, heap.read().live - before.live]))
"""


@pytest.mark.parametrize("seed", range(4))
def test_blocks_keep_what_is_in_them_and_go_back_to_the_system(seed: int) -> None:
    """Thousands of blocks of all sizes under changing limits: reused, split, grown, unmapped."""
    assert child(WORKOUT.format(seed=seed)) == [0, 0, 0, 0, 0]


def test_thousands_of_blocks_are_found_again() -> None:
    """Beyond the table's first sizes, with gaps that deletion leaves and fills."""
    found = child("""
source, held, lost = random.Random(0), {}, 0
for number in range(6000):
    _, address = aligned(THRESHOLD_BYTES)
    ctypes.c_uint64.from_address(address).value = number
    held[address] = number
    if number % 3 == 0:
        gone = source.choice(list(held)) if number % 100 == 0 else address
        lost += ctypes.c_uint64.from_address(gone).value != held.pop(gone)
        libc.free(gone)
for address, number in held.items():
    lost += ctypes.c_uint64.from_address(address).value != number or libc.malloc_usable_size(address) != THRESHOLD_BYTES
    libc.free(address)
count, held = len(held), None  # the dictionary itself is a block
heap.give_back()
print(json.dumps([count, lost, heap.read().mapped - before.mapped]))
""")
    assert found == [4000, 0, 0]


def test_at_the_limit_idle_blocks_become_the_new_one() -> None:
    """Whole, split and grown: never more mapped than the limit as long as what is in use fits."""
    found = child("""
heap.set_limit(before.mapped + 32 * MIB)
_, large = aligned(24 * MIB)
libc.free(large)
_, part = aligned(16 * MIB)
split = heap.read().mapped - before.mapped
_, rest = aligned(8 * MIB)
reused = heap.read().mapped - before.mapped
libc.free(rest)
_, grown = aligned(16 * MIB)
at_limit = heap.read().mapped - before.mapped
_, beyond = aligned(4 * MIB)
use = heap.read()
libc.free(beyond)
print(json.dumps([part == large, split, rest == part + 16 * MIB, reused, at_limit, use.mapped - before.mapped,
    heap.read().mapped - before.mapped]))
""")
    assert found == [True, 24 * MIB, True, 24 * MIB, 32 * MIB, 36 * MIB, 32 * MIB]


def test_what_is_idle_goes_before_an_allocation_fails() -> None:
    found = child("""
_, idle = aligned(64 * MIB)
libc.free(idle)
status = open("/proc/self/status").read()
reserved = int(status.split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (reserved + 8 * MIB, reserved + 8 * MIB))
code, other = aligned(66 * MIB)
refused, _ = aligned(64 * MIB)
print(json.dumps([code, other is not None, refused, libc.malloc(1 << 62)]))
""")
    assert found == [0, True, 12, None]  # ENOMEM


def test_a_block_is_resized_where_there_is_no_room_for_another() -> None:
    found = child("""
_, block = aligned(64 * MIB)
ctypes.memset(block, 5, 64 * MIB)
status = open("/proc/self/status").read()
reserved = int(status.split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (reserved + 8 * MIB, reserved + 8 * MIB))
same = libc.realloc(block, 64 * MIB - 100)
shorter = libc.realloc(same, 40 * MIB)
longer = libc.realloc(shorter, 44 * MIB)
use = heap.read()
kept = all(ctypes.string_at(longer + at, 100) == b"\\x05" * 100 for at in (0, 20 * MIB, 40 * MIB - 100))
libc.free(longer)
print(json.dumps([same == block, shorter == block, kept, use.live - before.live, heap.read().live - before.live]))
""")
    assert found == [True, True, True, 44 * MIB, 0]


def test_every_entry_point_knows_a_block() -> None:
    found = child("""
_, block = aligned(MIB)
ctypes.memset(block, 7, MIB)
longer = libc.realloc(block, 3 * MIB)
kept = ctypes.string_at(longer, MIB) == b"\\x07" * MIB
shorter = libc.reallocarray(longer, 10, 10)
still = ctypes.string_at(shorter, 100) == b"\\x07" * 100
overflow = libc.reallocarray(None, 1 << 40, 1 << 40)
ours = heap.read().live - before.live
small = libc.malloc(100)
print(json.dumps([kept, still, overflow, ours, libc.malloc_usable_size(small) >= 100,
    aligned(MIB, 3)[0], aligned(MIB, 1 << 16)[0], aligned(MIB, 1 << 16)[1] % (1 << 16)]))
""")
    assert found == [True, True, None, 0, True, 22, 0, 0]  # EINVAL


def test_threads_and_forks_find_it_whole() -> None:
    found = child("""
import os
rounds = 20_000

def work(number):
    for round in range(rounds):
        _, block = aligned(THRESHOLD_BYTES * (1 + (number + round) % 7))
        ctypes.memset(block, number, 4096)
        libc.free(block)

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
codes = []
for _ in range(20):
    if (child := os.fork()) == 0:
        rounds = 100
        work(9)
        os._exit(0)
    codes.append(os.waitpid(child, 0)[1])
for thread in threads:
    thread.join()
heap.give_back()
print(json.dumps([sum(codes), heap.read().live - before.live]))
""")
    assert found == [0, 0]


def test_without_the_library_glibc_maps_the_same_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "library_path", lambda: None)
    settings = environment.allocator_environment()
    assert "LD_PRELOAD" not in settings
    assert "MKL_DISABLE_FAST_MM" not in settings  # its buffers would be mapped anew for every product
    assert int(settings["MALLOC_MMAP_THRESHOLD_"]) == THRESHOLD_BYTES
