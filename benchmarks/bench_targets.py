"""What `make bench` has to reach: every target from the raw results, with its bar.

Legend: C chunk length, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.bench_measure import Record, ratio
from benchmarks.bench_memory import FULL, find, fits_in, peak_bytes
from benchmarks.bench_pair import POLICY
from benchmarks.bench_step import FULL as FULL_STEP
from benchmarks.bench_step import PERFORMER_PYTORCH, SGEMM
from benchmarks.page import Target, at_least, at_most

LEAST_CHUNK = 256
"""Smallest C that the bound on time is promised for."""


def targets(sections: Record) -> list[Target]:
    """Of all sections that have been measured; a quick run meets none."""
    found: list[Target] = []
    for name, make in _TARGETS.items():
        if name in sections:
            shown = sections[name]["quick"]
            found.extend({**target, "met": target["met"] and not shown} for target in make(sections[name]["result"]))
    return found


def _operator(result: Record) -> Iterator[Target]:
    seconds = result["seconds"][str(result["target_length"])]
    for peer, bar in (("published algorithm", 100), ("performer-pytorch", 10), ("softmax SDPA", 10)):
        yield at_least(f"operator: against {peer}", ratio(seconds[peer], seconds["slimtune"]), "times faster", bar)


def sgemm_share(result: Record, configuration: str) -> float:
    """Rate of the full step's products over that of the machine's sgemm, in the same rounds."""
    found = result["configurations"][configuration]
    rate: float = found["full_flops"] / result["sgemm_flops"]
    return rate * ratio(found["seconds"][SGEMM], found["seconds"][FULL_STEP])


def overheads(result: Record, configuration: str) -> dict[str, tuple[float, float]]:
    """Time over the full step's and the bound on it, for every C and policy of a configuration."""
    found = result["configurations"][configuration]
    full = found["seconds"][FULL_STEP]
    return {name: (ratio(found["seconds"][name], full), chunk["bound"]) for name, chunk in found["chunked"].items()}


def _step(result: Record) -> Iterator[Target]:
    yield at_least("sgemm share", sgemm_share(result, "PTB"), "of the sgemm rate, at least", 0.9)
    shares = [
        measured / bound
        for configuration in ("PTB", "ENW")
        for name, (measured, bound) in overheads(result, configuration).items()
        if result["configurations"][configuration]["chunked"][name]["chunk_length"] >= LEAST_CHUNK
    ]
    yield at_most("slim overhead", max(shares), "of the bound, at most", 1.0)
    seconds = result["configurations"]["PTB"]["seconds"]
    for peer, name, bar in (
        ("published algorithm", "published algorithm, full", 5),
        ("performer-pytorch, 266 features", PERFORMER_PYTORCH, 10),
    ):
        yield at_least(f"step: against {peer}", ratio(seconds[name], seconds[FULL_STEP]), "times faster", bar)


def _memory(result: Record) -> Iterator[Target]:
    seconds = result["pair"]["seconds"]
    yield at_most(
        "slim overhead at T = 64k", ratio(seconds[POLICY], seconds[FULL]), "of the full step's time, at most", 1.0
    )

    def peak(method: str, tokens: int) -> int:
        return peak_bytes(find(result["points"], method=method, tokens=tokens))

    tokens = result["compared_at"]
    yield at_least("memory: full over slim", peak(FULL, tokens) / peak(POLICY, tokens), "times less", 10)
    short, long = result["flat_between"]
    yield at_most("memory: 1M over 64k tokens", peak(POLICY, long) / peak(POLICY, short), "ratio, at most", 1.03)


def _longer_ratio(result: Record) -> float:
    """T of SLiM over the longest T of the full step; 0 if SLiM did not stay below the cap."""
    slim: Record = result["slim"]
    longer: float = slim["tokens"] / result["full_tokens"]
    return longer if fits_in(slim, result["cap_bytes"]) else 0.0


def _longer(result: Record) -> Iterator[Target]:
    yield at_least("longer", _longer_ratio(result), "times longer", 100)


_TARGETS: dict[str, Callable[[Record], Iterator[Target]]] = {
    "operator": _operator,
    "step": _step,
    "memory": _memory,
    "longer": _longer,
}
