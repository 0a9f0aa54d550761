"""The longest sequence that a cap can train, other things equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from slim_core.planning.memory_model import Schedule
from slim_core.planning.plan import Calibration, Chunking, StatePolicy, Workload
from slim_core.planning.schedules import LONGEST_SMALL, chunk_lengths, least_peak, peak, policies_of, small_schedules

LONGEST_SEQUENCE = 1 << 31
"""Where the search ends."""
_INTERPOLATIONS = 8
"""Steps of the search that take the peak for linear in the length, which it nearly is; then it halves."""


def longest_sequence(workload: Workload, cap: int, calibration: Calibration, chunking: Chunking | None) -> int:
    """0 if there is none. Learned positions end it, unless documents are packed, whose positions start afresh."""
    model = workload.model
    limit = LONGEST_SEQUENCE
    if model.max_positions is not None and workload.train.packing != "packed":
        limit = model.max_positions
    default, *others = policies_of(workload)
    if chunking is None and "stride" in others:
        return _longest_of_all(workload, cap, calibration, limit)
    if chunking is None:
        # Of two chunks or more, the length of least memory is the same for every sequence: states grow neither under
        # `reverse`, nor does what grows under `prefix` depend on it.
        policy: StatePolicy = others[0] if others else default
        endless = _with_length(workload, LONGEST_SEQUENCE)
        own = min(
            chunk_lengths(LONGEST_SMALL),
            key=lambda length: (peak(endless, Schedule(length, policy, 1), calibration).total, length),
        )
    else:
        policy, own = chunking.state_policy or default, chunking.chunk_length

    def least(length: int) -> int:
        considered = {Schedule(min(own, length), policy, 1)}
        if chunking is None:  # where states outweigh activations, few chunks may be kept for less, or be one
            considered |= {Schedule(min(own, length), default, 1), Schedule(length, default, 1)}
        return least_peak(_with_length(workload, length), considered, calibration)

    return _last_below(least, cap, nearly_linear_from=min(2 * own, limit), limit=limit)


def _longest_of_all(workload: Workload, cap: int, calibration: Calibration, limit: int) -> int:
    """Where the best schedule depends on the length: the longest sequence of the one that is best for a little more,
    until none is."""

    longest = 0
    length = min(workload.train.sequence_length, limit)  # which mostly fits
    while longest < limit:
        longer = _with_length(workload, length)
        best = min(small_schedules(longer), key=lambda schedule: peak(longer, schedule, calibration).total)
        own = best.chunk_length if best.chunk_length < length else limit

        def peak_of(length: int, own: int = own, policy: StatePolicy = best.state_policy) -> int:
            schedule = Schedule(min(own, length), policy, 1)
            return peak(_with_length(workload, length), schedule, calibration).total

        found = _last_below(peak_of, cap, nearly_linear_from=min(length, limit), limit=limit)
        if found <= longest and length == longest + 1:
            break
        longest = max(longest, found)
        length = longest + 1
    return longest


def _last_below(least: Callable[[int], int], cap: int, *, nearly_linear_from: int, limit: int) -> int:
    """The largest length up to the limit whose peak is at most the cap, for a peak that grows; 0 if none."""
    low, high = nearly_linear_from, limit
    if (high_peak := least(high)) <= cap:
        return high
    if (low_peak := least(low)) > cap:
        low, high = 0, low
        interpolations = 0
    else:
        interpolations = _INTERPOLATIONS
    while high - low > 1:
        middle = (low + high) // 2
        if interpolations > 0:
            interpolations -= 1
            middle = low + (cap - low_peak) * (high - low) // (high_peak - low_peak)
            middle = min(max(middle, low + 1), high - 1)
        if (middle_peak := least(middle)) <= cap:
            low, low_peak = middle, middle_peak
        else:
            high, high_peak = middle, middle_peak
    return low


def _with_length(workload: Workload, length: int) -> Workload:
    return replace(workload, train=replace(workload.train, sequence_length=length))
