"""The schedules that the planner considers, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from slim_core.planning.memory_model import Schedule, predict_peak
from slim_core.planning.plan import Calibration, Chunking, MemoryBreakdown, StatePolicy, Workload
from slim_core.planning.time_model import step_seconds

SHORTEST_CHUNK = 16
"""The planner's shortest. Shorter ones cost time and save little: by then states outweigh the activations, or overheads
the work."""
LONGEST_SMALL = 3 << 10
"""The chunk length of least memory is not above this, unless it is that of the whole sequence."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule and what it would cost."""

    schedule: Schedule
    breakdown: MemoryBreakdown
    step_seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.breakdown.total


def policies_of(workload: Workload) -> tuple[StatePolicy, ...]:
    """The state policies that are worth considering, the user's default first.

    The prefix of keys and values is softmax attention's only one. Of a performer `stride` would never win: `reverse`
    needs less memory and `keep` less time. But where documents may begin in every chunk, `reverse` keeps every set, and
    twice as wide as `keep` does: there `stride` is the one that saves.
    """
    if workload.model.attention == "softmax":
        return ("prefix",)
    return ("keep", "stride" if workload.train.packing == "packed" else "reverse")


def allowed_policies(workload: Workload) -> tuple[StatePolicy, ...]:
    """Those that a user may ask for."""
    return ("prefix",) if workload.model.attention == "softmax" else ("keep", "reverse", "stride")


def schedules(workload: Workload, chunking: Chunking | None, max_positions: int | None) -> Iterator[Schedule]:
    """What the planner considers: chunk lengths 2^i and 3 * 2^i and the whole sequence, each with `policies_of` it.

    Micro-batches are halved batches of whole sequences, or one sequence in chunks: a longer chunk of fewer sequences
    has as many positions at once, fewer states and fewer chunks. Under a chunk length of the user's all are considered.
    """
    sequence_length, whole_batch = workload.train.sequence_length, workload.train.batch_size
    longest = min(sequence_length, max_positions or sequence_length)
    default, *_ = considered = policies_of(workload)
    if chunking is None:
        lengths = chunk_lengths(longest) | {longest}
    else:
        lengths = {min(longest, chunking.chunk_length)}
        considered = (chunking.state_policy or default,)
    batch_sizes = {max(1, whole_batch >> shift) for shift in range(whole_batch.bit_length())}
    for chunk_length in sorted(lengths):
        whole = chunk_length == sequence_length
        for batch_size in sorted(batch_sizes if chunking is not None or whole else {1}):
            if max_positions is not None and batch_size * chunk_length > max_positions:
                continue
            for policy in (default,) if whole else considered:  # one chunk: there is nothing to keep or to reverse
                yield Schedule(chunk_length, policy, batch_size)


def small_schedules(workload: Workload) -> Iterator[Schedule]:
    """Those of one sequence at a time and short chunks, or one: among them is the one of least memory."""
    length = workload.train.sequence_length
    for policy in policies_of(workload):
        for chunk_length in chunk_lengths(min(length, LONGEST_SMALL)) | {length}:
            yield Schedule(chunk_length, policy, 1)


def chunk_lengths(longest: int) -> set[int]:
    """2^i and 3 * 2^i from the shortest chunk on."""
    exponents = range(longest.bit_length())
    return {n for e in exponents for n in (1 << e, 3 << e) if SHORTEST_CHUNK <= n <= longest}


def whole_sequences(workload: Workload, batch_size: int) -> Schedule:
    """The ordinary step: one chunk."""
    return Schedule(workload.train.sequence_length, policies_of(workload)[0], batch_size)


def candidate(workload: Workload, schedule: Schedule, calibration: Calibration) -> Candidate:
    """By both models."""
    breakdown = peak(workload, schedule, calibration)
    return Candidate(schedule, breakdown, step_seconds(workload, schedule, calibration))


def peak(workload: Workload, schedule: Schedule, calibration: Calibration) -> MemoryBreakdown:
    """By the memory model, and what jobs of this model taught beside it."""
    breakdown = predict_peak(workload, schedule, calibration)
    excess = calibration.peak_excess_bytes
    return replace(breakdown, learned=excess) if excess else breakdown


def least_peak(workload: Workload, considered: Iterable[Schedule], calibration: Calibration) -> int:
    """The smallest cap under which one of the schedules fits."""
    return min(peak(workload, schedule, calibration).total for schedule in considered)
