"""Sections 3 to 5: peak process memory and step time against T, against C, and the longest T in a cap.

Every point is a process of its own with the trainer's environment (`bench_child.py`), rounds interleaved over the
points; but the speed of SLiM against the full step, where it is a target, is measured by `bench_pair.py`.

Legend: T tokens, C chunk length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.bench_measure import GIB, MIB, Record, median, num_threads, run_section, run_steps
from slim_core.config import ModelConfig

MODEL = ModelConfig(num_layers=4, model_width=256, num_heads=4, mlp_width=1024)
CHUNK_LENGTH = 512
POLICIES = ("reverse", "keep", "stride")
LIMIT_BYTES = 16 * GIB
"""Enforced in every process; a method that would need more at some T is not run there."""
FULL = "full"
CHECKPOINT = "checkpoint per layer"

LENGTHS = (4_096, 16_384, 65_536, 262_144, 1_048_576)
LONGEST = {FULL: 65_536, CHECKPOINT: 262_144}
"""Largest T that stays below `LIMIT_BYTES`, of the methods whose memory grows with T."""
ROUNDS_AND_STEPS = {4_096: (5, 3), 16_384: (3, 3), 65_536: (3, 3), 262_144: (1, 1), 1_048_576: (1, 1)}
"""By T. The first of several steps is a warm-up; a single one, minutes long, is its own."""
PAIR_LENGTH = 65_536

TRADEOFF_LENGTH = 16_384
SHORTEST_CHUNK = 16
TRADEOFF_ROUNDS, TRADEOFF_STEPS = 3, 3
SLOW_CHUNK = 32
"""Up to this C, where a step takes several times the full one's time, a point has one round."""

CAP_BYTES = 1 * GIB
TIMES_LONGER = 100
RESOLUTION = 256
"""Of the longest T of the full step."""
LONGER_STEPS = 2

QUICK_MODEL = ModelConfig(num_layers=2, model_width=64, num_heads=1, mlp_width=128)
QUICK_LENGTHS = (512, 1_024)
QUICK_LONGEST = {"keep": 512, "stride": 512, CHECKPOINT: 512, FULL: 512}
QUICK_CHUNK_LENGTH = 128
QUICK_CAP_BYTES = 400 * MIB
QUICK_RESOLUTION = 16_384
"""Fits in the cap, and twice as many do not: each process takes seconds to start."""


def memory_section(quick: bool) -> Record:
    """Peak and time of every method at every T, and the interleaved pair of SLiM and the full step at T = 64k."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    longest = QUICK_LONGEST if quick else LONGEST
    points = [
        _point(method, length, QUICK_CHUNK_LENGTH if quick else CHUNK_LENGTH)
        for length in lengths
        for method in (*POLICIES, FULL, CHECKPOINT)
        if length <= longest.get(method, length)
    ]
    for length in lengths:
        rounds, steps = (1, 1) if quick else ROUNDS_AND_STEPS[length]
        here = [point for point in points if point["tokens"] == length]
        for _ in range(rounds):
            _round(here, quick=quick, steps=steps)
    return {
        "model": (QUICK_MODEL if quick else MODEL).to_json(),
        "chunk_length": points[0]["chunk_length"],
        "points": points,
        "compared_at": lengths[0] if quick else PAIR_LENGTH,
        "flat_between": list(lengths) if quick else [PAIR_LENGTH, LENGTHS[-1]],
        "pair": run_section("bench_pair", quick=quick),
    }


def tradeoff_section(quick: bool) -> Record:
    """Peak and time against C at one T, for the policies `keep` and `reverse`."""
    length = QUICK_LENGTHS[-1] if quick else TRADEOFF_LENGTH
    shortest = length // 2 if quick else SHORTEST_CHUNK
    chunk_lengths = [shortest << n for n in range(int(math.log2(length // shortest)))]
    points = [_point(policy, length, C) for C in chunk_lengths for policy in ("keep", "reverse")]
    points.append(_point(FULL, length, length))
    for number in range(1 if quick else TRADEOFF_ROUNDS):
        in_round = [point for point in points if number == 0 or point["chunk_length"] > SLOW_CHUNK]
        _round(in_round, quick=quick, steps=TRADEOFF_STEPS)
    return {"model": (QUICK_MODEL if quick else MODEL).to_json(), "tokens": length, "points": points}


def longer_section(quick: bool) -> Record:
    """The longest T whose full step runs under the cap, and SLiM at a multiple of it under the same cap.

    A step fits if the process, whose allocations beyond the cap fail, ends well and peaks below it.
    """
    cap = QUICK_CAP_BYTES if quick else CAP_BYTES
    resolution = QUICK_RESOLUTION if quick else RESOLUTION
    tried: list[Record] = []

    def fits(length: int) -> bool:
        point = _point(FULL, length, length)
        _run(point, quick=quick, steps=1, cap_bytes=cap)
        tried.append(point)
        return fits_in(point, cap)

    long = resolution
    if not fits(long):
        raise RuntimeError(f"cap: not even {long} tokens fit in {cap} bytes")
    while fits(2 * long):
        long *= 2
    too_long = 2 * long
    while too_long - long > resolution:
        middle = (long + too_long) // 2
        long, too_long = (middle, too_long) if fits(middle) else (long, middle)
    slim = _point("reverse", long * (2 if quick else TIMES_LONGER), CHUNK_LENGTH)
    _run(slim, quick=quick, steps=1 if quick else LONGER_STEPS, cap_bytes=cap)
    return {
        "model": (QUICK_MODEL if quick else MODEL).to_json(),
        "cap_bytes": cap,
        "full_tokens": long,
        "full_too_long": too_long,
        "full": tried,
        "slim": slim,
    }


def fits_in(point: Record, cap_bytes: int) -> bool:
    """Whether every run of a point ended well and below the cap."""
    return all(not run["out_of_memory"] and run["peak_bytes"] <= cap_bytes for run in point["runs"])


def peak_bytes(point: Record) -> int:
    """The largest of all rounds."""
    return max(int(run["peak_bytes"]) for run in point["runs"])


def step_seconds(point: Record) -> float:
    """Median of all steps of all rounds, the first of each process not counted where there are more; not a number where
    no step was done."""
    if not num_samples(point):
        return math.nan
    return median(seconds for run in point["runs"] for seconds in _counted(run["step_seconds"]))


def num_samples(point: Record) -> int:
    """Steps behind `step_seconds`."""
    return sum(len(_counted(run["step_seconds"])) for run in point["runs"])


def find(points: Sequence[Record], **wanted: Any) -> Record:
    """The point with these fields."""
    return next(point for point in points if all(point[name] == value for name, value in wanted.items()))


def _counted(seconds: list[float]) -> list[float]:
    return seconds[1:] or seconds


def _point(method: str, length: int, chunk_length: int) -> Record:
    """What to run, and the runs, none as yet."""
    is_whole = method in (FULL, CHECKPOINT)
    return {"method": method, "tokens": length, "chunk_length": length if is_whole else chunk_length, "runs": []}


def _round(points: Sequence[Record], *, quick: bool, steps: int) -> None:
    """One run of every point, one after the other; side by side only where nobody looks at the times."""
    with ThreadPoolExecutor(num_threads() if quick else 1) as pool:
        list(pool.map(lambda point: _run(point, quick=quick, steps=_steps(point, steps)), points))


def _steps(point: Record, steps: int) -> int:
    """The peak that a target rests on is that of a second step as well."""
    return max(2, steps) if point["method"] == "reverse" and point["tokens"] == LENGTHS[-1] else steps


def _run(point: Record, *, quick: bool, steps: int, cap_bytes: int = LIMIT_BYTES) -> None:
    point["runs"].append(
        run_steps(
            quick=quick,
            method="checkpoint" if point["method"] == CHECKPOINT else "slim",
            model=(QUICK_MODEL if quick else MODEL).to_json(),
            tokens=point["tokens"],
            chunk_length=point["chunk_length"],
            policy=point["method"] if point["method"] in POLICIES else "keep",
            steps=steps,
            cap_bytes=cap_bytes,
        )
    )
