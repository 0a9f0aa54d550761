"""The choice of a plan: the fastest schedule whose predicted peak fits under the cap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from slim_core.config import LoraConfig
from slim_core.planning.costs import Overheads, Update, uniform_costs
from slim_core.planning.longest import longest_sequence
from slim_core.planning.memory_model import Schedule
from slim_core.planning.plan import Calibration, Chunking, FrontierPoint, MemoryCapInfeasibleError, Plan, Workload
from slim_core.planning.schedules import (
    Candidate,
    allowed_policies,
    candidate,
    least_peak,
    peak,
    schedules,
    small_schedules,
    whole_sequences,
)
from slim_core.planning.shapes import check_adapters, check_matching
from slim_core.planning.time_model import step_seconds

_SHORTLIST = 6
"""The schedules of least memory, of which one is still that when the workload is changed a little."""
_SIMILAR = 1.02
"""Plans within 2 % of the fastest count as equally fast: of those the one that needs least memory wins."""

_MIB = 2**20


def default_calibration() -> Calibration:
    """Cautious numbers for a machine that no worker has measured: more memory and less speed than most have."""
    return Calibration(
        source="default",
        device="cpu",
        threads=1,
        runtime_bytes=320 * _MIB,
        float32=uniform_costs(flops_per_second=2e10, numbers_per_second=3e8, call_seconds=1e-5),
        bfloat16=uniform_costs(flops_per_second=5e9, numbers_per_second=3e8, call_seconds=1e-5),
        overheads=Overheads(layer_forward=3e-4, layer_backward=5e-4, chunk_forward=5e-4, chunk_backward=1e-3),
        adamw=Update(per_step=1e-3, per_tensor=3e-5, per_number=1e-8),
        adafactor=Update(per_step=1e-3, per_tensor=3e-4, per_number=2e-8),
        sgd=Update(per_step=1e-3, per_tensor=3e-5, per_number=1e-8),
    )


def plan_job(
    workload: Workload,
    memory_cap_bytes: int,
    calibration: Calibration,
    chunking: Chunking | None = None,
    max_positions: int | None = None,
) -> Plan:
    """The fastest plan under the cap.

    Args:
        chunking: the user's own chunk length and policy; the planner then chooses the micro-batch only.
        max_positions: no more than this many positions (micro-batch times chunk length) at once; for another attempt
            after one that needed more than predicted.

    Raises:
        MemoryCapInfeasibleError: nothing fits; carries the smallest cap and the longest sequence that would.
        ValueError: `chunking` is not possible for this sequence or this attention, adapters for this model, or matching
            for both.
    """
    train = workload.train
    if chunking is not None:
        check_chunking(workload, chunking)
    if train.lora is not None:
        check_adapters(workload.model, train.lora)
    check_matching(workload.model, train)
    matching_seconds = _matching_seconds(workload, calibration)
    candidates = [
        candidate(workload, schedule, calibration) for schedule in schedules(workload, chunking, max_positions)
    ]
    smallest = min(candidates, key=lambda c: (c.peak_bytes, c.step_seconds))
    fitting = [c for c in candidates if c.peak_bytes <= memory_cap_bytes]
    if not fitting:
        raise _infeasible(workload, memory_cap_bytes, calibration, chunking, candidates)
    fastest = min(c.step_seconds for c in fitting)
    chosen = min(
        (c for c in fitting if c.step_seconds <= fastest * _SIMILAR), key=lambda c: (c.peak_bytes, c.step_seconds)
    )
    whole = whole_sequences(workload, train.batch_size)
    unchunked = next((c for c in candidates if c.schedule == whole), None) or candidate(workload, whole, calibration)
    schedule = chosen.schedule
    return Plan(
        chunk_length=schedule.chunk_length,
        num_chunks=math.ceil(train.sequence_length / schedule.chunk_length),
        state_policy=schedule.state_policy,
        micro_batch_size=schedule.micro_batch_size,
        accumulation_steps=math.ceil(train.batch_size / schedule.micro_batch_size),
        predicted_peak_bytes=chosen.peak_bytes,
        breakdown=chosen.breakdown,
        predicted_step_seconds=chosen.step_seconds,
        predicted_total_seconds=chosen.step_seconds * train.steps + matching_seconds,
        unchunked_peak_bytes=unchunked.peak_bytes,
        minimum_cap_bytes=smallest.peak_bytes,
        max_sequence_length=longest_sequence(workload, memory_cap_bytes, calibration, chunking),
        check_chunk_length=_check_chunk_length(workload, memory_cap_bytes, calibration, schedule),
        reason=_reason(chosen, unchunked, fitting, candidates, memory_cap_bytes, chunking),
        calibration_source=calibration.source,
        time_factor=calibration.time_factor,
        frontier=tuple(_frontier(candidates)),
        calibration_version=calibration.version,
    )


def _matching_seconds(workload: Workload, calibration: Calibration) -> float:
    """Of the phase before the first step, roughly and rather too much: an update as a step over one sequence of its
    length. It has a second attention forward, but no head, and no MLP backward."""
    train = workload.train
    if train.matching is None:
        return 0.0
    like = replace(train, sequence_length=train.matching_length, batch_size=1)
    schedule = Schedule(train.matching_length, "keep", 1)
    return train.matching.steps * step_seconds(replace(workload, train=like), schedule, calibration)


def check_chunking(workload: Workload, chunking: Chunking) -> None:
    """Raises ValueError, which begins with the field's name, where a user's own choice is impossible."""
    longest, allowed = workload.train.sequence_length, allowed_policies(workload)
    if not 1 <= chunking.chunk_length <= longest:
        raise ValueError(f"chunk_length: must be between 1 and sequence_length ({longest})")
    if chunking.state_policy is not None and chunking.state_policy not in allowed:
        raise ValueError(f"state_policy: {workload.model.attention} attention has {', '.join(allowed)}")


def plan_with_lessons(
    workload: Workload,
    memory_cap_bytes: int,
    calibration: Calibration,
    chunking: Chunking | None = None,
    max_positions: int | None = None,
) -> Plan:
    """`plan_job`; where nothing fits only for what earlier jobs held beyond their plans, the plan that does not count
    with it: better than none, and its probe will tell. Raises as `plan_job` does."""
    try:
        return plan_job(workload, memory_cap_bytes, calibration, chunking, max_positions)
    except MemoryCapInfeasibleError:
        if not calibration.peak_excess_bytes:
            raise
    return plan_job(workload, memory_cap_bytes, replace(calibration, peak_excess_bytes=0), chunking, max_positions)


def _check_chunk_length(workload: Workload, cap: int, calibration: Calibration, chosen: Schedule) -> int | None:
    """The whole sequence, if one alone fits and the plan has chunks; else chunks half or twice as long."""
    whole, own = workload.train.sequence_length, chosen.chunk_length
    for length in (whole, own // 2, min(2 * own, whole)):
        if length not in (0, own):
            schedule = Schedule(length, chosen.state_policy, micro_batch_size=1)
            if peak(workload, schedule, calibration).total <= cap:
                return length
    return None


def _frontier(candidates: list[Candidate]) -> Iterator[FrontierPoint]:
    """The candidates that no other beats in memory and time at once, from the smallest to the fastest."""
    fastest = math.inf
    for each in sorted(candidates, key=lambda c: (c.peak_bytes, c.step_seconds)):
        if each.step_seconds < fastest:
            fastest = each.step_seconds
            yield FrontierPoint(
                chunk_length=each.schedule.chunk_length,
                state_policy=each.schedule.state_policy,
                micro_batch_size=each.schedule.micro_batch_size,
                predicted_peak_bytes=each.peak_bytes,
                predicted_step_seconds=each.step_seconds,
            )


def _reason(
    chosen: Candidate,
    unchunked: Candidate,
    fitting: list[Candidate],
    candidates: list[Candidate],
    cap: int,
    chunking: Chunking | None,
) -> str:
    ratio = chosen.step_seconds / unchunked.step_seconds
    whole = chosen == unchunked
    sentences = [
        f"The unchunked step fits, with {_size(chosen.peak_bytes)}."
        if whole
        else f"The unchunked step would need {_size(unchunked.peak_bytes)}, this plan needs {_size(chosen.peak_bytes)}."
    ]
    if learned := chosen.breakdown.learned:
        sentences.append(f"{_size(learned)} of that are what earlier jobs of this model held beyond their plans.")
    if not whole:
        sentences.append(f"It is predicted to take {ratio:.2f} x the unchunked time.")
    if chunking is not None:
        sentences.append("The chunk length and state policy are the ones asked for.")
    else:
        of = f"of {len(fitting)} schedules that fit ({len(candidates)} considered)"
        if min(c.step_seconds for c in fitting) < chosen.step_seconds:
            sentences.append(f"It is within 2 % of the fastest {of}, and needs the least memory of those that are.")
        else:
            sentences.append(f"It is the fastest {of}.")
    faster = [c for c in candidates if c.peak_bytes > cap and c.step_seconds * _SIMILAR < chosen.step_seconds]
    if faster:
        next_one = min(faster, key=lambda c: c.peak_bytes)
        sentences.append(
            f"The next faster one, of chunks of {next_one.schedule.chunk_length:,}, needs {_size(next_one.peak_bytes)}."
        )
    return " ".join(sentences)


def _infeasible(
    workload: Workload,
    cap: int,
    calibration: Calibration,
    chunking: Chunking | None,
    candidates: list[Candidate],
) -> MemoryCapInfeasibleError:
    shortlist = sorted(candidates, key=lambda c: (c.peak_bytes, c.step_seconds))[:_SHORTLIST]
    smallest = shortlist[0]
    longest = longest_sequence(workload, cap, calibration, chunking)
    suggestions = [f"raise memory_cap to {smallest.peak_bytes} bytes ({_size(smallest.peak_bytes)}) or more"]
    if longest:
        shorter_chunks = chunking is not None and chunking.chunk_length > longest
        suggestions.append(
            f"shorten sequence_length to {longest} or less" + (", and chunk_length with it" if shorter_chunks else "")
        )
    if chunking is not None:
        least = least_peak(workload, schedules(workload, None, None), calibration)
        if least <= cap:
            suggestions.append(f'set chunking to "auto": the planner has schedules that fit, from {_size(least)} on')
    for change, changed in _changes(workload):
        least = least_peak(changed, (each.schedule for each in shortlist), calibration)
        if least <= cap:
            suggestions.append(f"{change}: the smallest schedule then needs {_size(least)}")
    suggestions += _other_attention(workload, cap, calibration, chunking)
    fixed = smallest.breakdown
    model_bytes = fixed.parameters + fixed.gradients + fixed.optimizer
    if fixed.runtime >= cap:
        suggestions.append(f"no model fits: the runtime alone holds {_size(fixed.runtime)}")
    elif fixed.runtime + model_bytes > cap:
        suggestions.append(
            f"use a smaller model: weights, gradients and optimiser of this one need {_size(model_bytes)} beside "
            f"{_size(fixed.runtime)} of the runtime, whatever the sequence length"
        )
    return MemoryCapInfeasibleError(
        f"No schedule fits {_size(cap)}: the smallest needs {_size(smallest.peak_bytes)}.",
        memory_cap_bytes=cap,
        minimum_cap_bytes=smallest.peak_bytes,
        max_sequence_length=longest,
        suggestions=tuple(suggestions),
    )


def _changes(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Other ways to train the same model on the same data, in words and as workloads, from the least intrusive on."""
    train = workload.train
    if train.optimizer.name == "adamw":
        optimizer = replace(train.optimizer, name="adafactor")
        yield 'set optimizer.name to "adafactor"', replace(workload, train=replace(train, optimizer=optimizer))
    if train.precision == "float32":
        yield 'set precision to "bfloat16"', replace(workload, train=replace(train, precision="bfloat16"))
    if train.lora is None:
        yield 'set method to {"type": "lora"}', replace(workload, train=replace(train, lora=LoraConfig()))


def _other_attention(
    workload: Workload, cap: int, calibration: Calibration, chunking: Chunking | None
) -> Iterator[str]:
    """A Transformer as a performer, if that would fit: its memory does not grow with the sequence."""
    if workload.model.attention != "softmax":
        return
    performer = replace(workload, model=replace(workload.model, attention="performer", feature_map="favor"))
    own = None if chunking is None else replace(chunking, state_policy=None)
    considered = small_schedules(performer) if own is None else schedules(performer, own, None)
    least = least_peak(performer, considered, calibration)
    if least <= cap:
        yield (
            f'set attention to "performer", which approximates this model\'s own: the smallest schedule then needs '
            f"{_size(least)}"
        )


def _size(number_of_bytes: int) -> str:
    if number_of_bytes >= 1 << 30:
        return f"{number_of_bytes / (1 << 30):.2f} GiB"
    return f"{number_of_bytes / _MIB:.0f} MiB"
