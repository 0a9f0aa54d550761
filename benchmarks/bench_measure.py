"""How `make bench` measures: contenders in turns, processes of their own, and what the machine was doing meanwhile.

Two environments. `heap_environment` is for the sections that compare speeds: memory once taken stays in the process, so
that nobody pays for page faults, whatever was called before. `worker.environment.trainer_environment` is for those that
measure memory: it is what a job runs in.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slim_core.planning import Plan, Workload
from worker.environment import trainer_environment

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
GIB = 2**30

ROUNDS = 5
SLOW_ROUNDS = 3
SLOW_SECONDS = 20.0
"""A contender whose warm-up call took longer has `SLOW_ROUNDS` rounds; the tables say so."""
TURN_SECONDS = 0.3
"""A quick contender is called again until its turn has lasted this long; the turn's value is the median."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Something to be timed."""

    name: str
    call: Callable[[], object]


def interleave(contenders: Sequence[Contender], *, quick: bool = False) -> dict[str, list[float]]:
    """Seconds of a call of each contender, a value a round, all of them in turn in every round.

    One call of each comes first, uncounted. The order is drawn anew for every round, the same in every run, so that
    nobody always follows the same other.
    """
    order = random.Random(0)  # noqa: S311  # no secret
    rounds = {}
    for contender in contenders:
        slow = _seconds(contender.call) > SLOW_SECONDS
        rounds[contender.name] = 2 if quick else SLOW_ROUNDS if slow else ROUNDS
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(max(rounds.values())):
        for contender in order.sample(contenders, len(contenders)):
            if number < rounds[contender.name]:
                seconds[contender.name].append(_turn(contender.call, 0.0 if quick else TURN_SECONDS))
    return seconds


def _turn(call: Callable[[], object], least_seconds: float) -> float:
    taken = [_seconds(call)]
    while sum(taken) < least_seconds:
        taken.append(_seconds(call))
    return statistics.median(taken)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds that both had of the ratio within a round: a slow minute falls on both."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=False))


def median(values: Iterable[float]) -> float:
    """Of one contender's rounds."""
    return statistics.median(values)


def num_threads(*, quick: bool = False) -> int:
    """All cores; one where nobody looks at the times, since threads that wait for each other waste a busy machine."""
    return 1 if quick else os.cpu_count() or 1


def heap_environment(threads: int) -> dict[str, str]:
    """Everything from one heap, which is never given back (mallopt(3))."""
    allocator = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(64 * MIB),
    }
    return trainer_environment(threads) | allocator | {"PYTHONPATH": str(ROOT)}


def run_section(module: str, *, quick: bool) -> Record:
    """What `python -m benchmarks.<module>` prints, in a process with `heap_environment`."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *(["--quick"] if quick else [])]
    environment = heap_environment(num_threads(quick=quick))
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    record: Record = json.loads(done.stdout)
    return record


def run_steps(*, quick: bool, **spec: Any) -> Record:
    """A few training steps in a process with the trainer's environment (`benchmarks/bench_child.py`): peak and time."""
    threads = num_threads(quick=quick)
    environment = trainer_environment(threads) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.bench_child", json.dumps({**spec, "threads": threads})]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    record: Record = json.loads(done.stdout)
    shown = {name: spec[name] for name in ("method", "tokens", "chunk_length", "policy")}
    progress(" ".join(map(str, shown.values())), record)
    return record


def probe(workload: Workload, plan: Plan, data: Path, threads: int) -> Record:
    """A job's first steps in a process with the trainer's environment (`benchmarks/probe.py`): peak and time."""
    spec = {
        "model": workload.model.to_json(),
        "train": workload.train.to_json(),
        "plan": plan.to_json(),
        "data": str(data),
        "threads": threads,
        "validation": workload.train.evaluate_every is not None,
    }
    environment = trainer_environment(threads) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.probe", json.dumps(spec)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{workload}: {done.stderr[-2000:]}")
    result: Record = json.loads(done.stdout)
    return result


def progress(*what: object) -> None:
    """A line for whoever watches."""
    print(time.strftime("%H:%M:%S"), *what, file=sys.stderr, flush=True)


def machine() -> Record:
    """What the numbers were measured on."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    pages = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "cpu": cpu[0].split(":", 1)[1].strip() if cpu else platform.machine(),
        "threads": num_threads(),
        "memory_gib": round(int(pages.split()[1]) / 2**20, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }


def _commit() -> str:
    """What was measured; `-dirty` where the tree had other changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def measured(section: Callable[[bool], Record], *, quick: bool) -> Record:
    """The result of a section, with when it ran and how busy the machine was (load averages over a minute)."""
    started, load_before = time.time(), os.getloadavg()[0]
    result = section(quick)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started),
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "quick": quick,
        "machine": machine(),
        "result": result,
    }
