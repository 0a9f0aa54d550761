"""The planner: fits, is as fast as the cap allows, and says what would fit when nothing does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slim_core.config import (
    BUILTIN_MODELS,
    FEATURE_MAPS,
    EarlyStoppingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from slim_core.planning import (
    Calibration,
    Chunking,
    MemoryBreakdown,
    MemoryCapInfeasibleError,
    Plan,
    Workload,
    default_calibration,
    plan_job,
    plan_with_lessons,
)
from slim_core.planning import schedules as considered
from slim_core.planning.costs import Overheads, Update, uniform_costs
from slim_core.planning.longest import LONGEST_SEQUENCE
from slim_core.planning.memory_model import Schedule, predict_peak

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
NO_CAP = 1 << 50
LLAMA = ModelConfig(
    num_layers=30,
    model_width=576,
    num_heads=9,
    num_kv_heads=3,
    mlp_width=1536,
    vocab_size=49_152,
    attention="softmax",
    norm_type="rms",
    activation="swiglu",
    mlp_bias=False,
    positions="rotary",
    scaled_embeddings=False,
    tied_embeddings=True,
)
"""The shape of SmolLM2-135M."""
CALIBRATION = Calibration(
    source="by hand",
    device="cpu",
    threads=2,
    runtime_bytes=200 * MIB,
    float32=uniform_costs(8e10, 1e9, 1e-5),
    bfloat16=uniform_costs(4e10, 1e9, 1e-5),
    overheads=Overheads(1e-4, 2e-4, 1e-4, 2e-4),
    adamw=Update(1e-4, 1e-5, 1e-9),
    adafactor=Update(1e-4, 1e-4, 3e-9),
    sgd=Update(1e-4, 1e-5, 1e-9),
)
SMOLLM2 = Workload(LLAMA, TrainConfig(sequence_length=2_048, batch_size=2, steps=100, lora=LoraConfig()))
SLOW_CALLS = replace(CALIBRATION, overheads=Overheads(0.05, 0.05, 0.0, 0.0))
PTB = Workload(BUILTIN_MODELS["performer-ptb"], TrainConfig(sequence_length=16_384, batch_size=4, steps=100))


def changed(workload: Workload, **fields: Any) -> Workload:
    return replace(workload, train=replace(workload.train, **fields))


LORA_TARGETS = [
    ("query", "key_value"),
    ("mlp_in",),
    ("mlp_out", "key_value"),
    ("query", "key_value", "mlp_in", "mlp_out"),
]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    feature_map = draw(st.sampled_from(FEATURE_MAPS))
    norm_type: Any = draw(st.sampled_from(["layer", "rms"]))
    model = ModelConfig(
        attention=draw(st.sampled_from(["performer", "softmax"])),
        num_kv_heads=draw(st.sampled_from([None, 1])),
        norm_type=norm_type,
        mlp_bias=norm_type == "layer",
        num_layers=draw(st.integers(1, 6)),
        model_width=heads * draw(st.sampled_from([16, 32, 64, 128])),
        num_heads=heads,
        mlp_width=draw(st.integers(16, 4096)),
        vocab_size=draw(st.sampled_from([257, 5_000, 50_000])),
        feature_map=feature_map,
        num_features=draw(st.sampled_from([None, 256])) if feature_map == "favor" else None,
        norm=draw(st.sampled_from(["pre", "post"])),
        output_projection=draw(st.booleans()),
    )
    length = draw(st.one_of(st.integers(1, 300), st.integers(1, 200_000), st.sampled_from([1024, 4096, 65_536])))
    lora = LoraConfig(rank=draw(st.sampled_from([1, 8, 64])), targets=draw(st.sampled_from(LORA_TARGETS)))
    train = TrainConfig(
        sequence_length=length,
        batch_size=draw(st.integers(1, 9)),
        steps=10,
        optimizer=OptimizerConfig(name=draw(st.sampled_from(["adamw", "adafactor", "sgd"]))),
        lora=draw(st.sampled_from([None, lora])),
        precision=draw(st.sampled_from(["float32", "bfloat16"])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        packing=draw(st.sampled_from(["continuous", "packed", "single"])),
    )
    return Workload(model, train)


def smallest_cap(workload: Workload, **options: Any) -> int:
    """The smallest cap with a plan, by way of the error."""
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(workload, 1, CALIBRATION, **options)
    return caught.value.minimum_cap_bytes


def fits(workload: Workload, cap: int, **options: Any) -> bool:
    try:
        plan_job(workload, cap, CALIBRATION, **options)
    except MemoryCapInfeasibleError:
        return False
    return True


BOUNDED = settings(max_examples=12, deadline=None, derandomize=True)


@BOUNDED
@given(workload=workloads(), share=st.floats(0, 1))
def test_a_plan_is_consistent_and_under_the_cap(workload: Workload, share: float) -> None:
    least = smallest_cap(workload)
    most = plan_job(workload, NO_CAP, CALIBRATION).predicted_peak_bytes
    cap = int(least + share * max(0, most - least))
    plan = plan_job(workload, cap, CALIBRATION)
    assert plan.predicted_peak_bytes <= cap
    assert plan.predicted_peak_bytes == plan.breakdown.total
    assert min(plan.breakdown.to_json().values()) >= 0
    assert plan.minimum_cap_bytes == least
    assert 1 <= plan.chunk_length <= workload.train.sequence_length
    assert plan.num_chunks == math.ceil(workload.train.sequence_length / plan.chunk_length)
    assert 1 <= plan.micro_batch_size <= workload.train.batch_size
    assert plan.accumulation_steps == math.ceil(workload.train.batch_size / plan.micro_batch_size)
    assert plan.predicted_total_seconds == plan.predicted_step_seconds * workload.train.steps
    assert plan.calibration_source == "by hand"
    fastest = min(entry.predicted_step_seconds for entry in plan.frontier if entry.predicted_peak_bytes <= cap)
    assert plan.predicted_step_seconds <= 1.02 * fastest
    assert ("within 2 % of the fastest" in plan.reason) == (fastest < plan.predicted_step_seconds)
    whole = plan.num_chunks == 1 and plan.accumulation_steps == 1
    assert plan.reason.startswith("The unchunked step fits") == whole
    assert ("x the unchunked time" in plan.reason) == (not whole)


@BOUNDED
@given(workload=workloads())
def test_more_memory_is_never_slower(workload: Workload) -> None:
    least = smallest_cap(workload)
    seconds = [
        plan_job(workload, int(least * factor), CALIBRATION).predicted_step_seconds
        for factor in (1, 1.02, 1.1, 1.3, 1.7, 2.5, 4, 10, 1000)
    ]
    assert seconds == sorted(seconds, reverse=True)


@BOUNDED
@given(workload=workloads())
def test_the_frontier_is_pareto_and_has_the_choice(workload: Workload) -> None:
    plan = plan_job(workload, int(1.2 * smallest_cap(workload)), CALIBRATION)
    points = [(point.predicted_peak_bytes, point.predicted_step_seconds) for point in plan.frontier]
    assert points == sorted(points)
    seconds = [point[1] for point in points]
    assert all(later < earlier for earlier, later in pairwise(seconds))
    assert points[0][0] == plan.minimum_cap_bytes
    assert (plan.predicted_peak_bytes, plan.predicted_step_seconds) in points
    # Every point is a plan that the planner would give: what it says is what a user gets who asks for it.
    for point in plan.frontier:
        assert plan_job(workload, point.predicted_peak_bytes, CALIBRATION).predicted_peak_bytes <= (
            point.predicted_peak_bytes
        )


def test_nothing_within_the_cap_is_noticeably_faster() -> None:
    for cap in (smallest_cap(PTB), 600 * MIB, 1000 * MIB, NO_CAP):
        plan = plan_job(PTB, cap, CALIBRATION)
        fitting = [p.predicted_step_seconds for p in plan.frontier if p.predicted_peak_bytes <= cap]
        assert plan.predicted_step_seconds <= 1.02 * min(fitting)
        similar = [p.predicted_peak_bytes for p in plan.frontier if p.predicted_step_seconds <= 1.02 * min(fitting)]
        assert plan.predicted_peak_bytes == min(similar)


@BOUNDED
@given(workload=workloads())
def test_the_minimum_cap_is_exact(workload: Workload) -> None:
    least = smallest_cap(workload)
    assert fits(workload, least)
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(workload, least - 1, CALIBRATION)
    error = caught.value
    assert (error.memory_cap_bytes, error.minimum_cap_bytes) == (least - 1, least)
    assert str(least) in error.suggestions[0]


def assert_longest(workload: Workload, cap: int, chunking: Chunking | None) -> int:
    def with_length(length: int) -> bool:
        own = chunking and replace(chunking, chunk_length=min(chunking.chunk_length, length))
        return fits(changed(workload, sequence_length=length), cap, chunking=own)

    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(workload, cap, CALIBRATION, chunking)
    longest = caught.value.max_sequence_length
    assert longest < workload.train.sequence_length
    if longest:
        assert with_length(longest)
        assert any(str(longest) in suggestion for suggestion in caught.value.suggestions)
    assert not with_length(longest + 1)
    return longest


@settings(BOUNDED, max_examples=6)
@given(workload=workloads(), share=st.floats(0, 1))
def test_the_longest_sequence_is_exact(workload: Workload, share: float) -> None:
    least = smallest_cap(workload)
    shortest = smallest_cap(changed(workload, sequence_length=1))
    assume(shortest < least)
    cap = int(shortest + share * (least - 1 - shortest))
    assert assert_longest(workload, cap, None) >= 1
    assert assert_longest(workload, shortest - 1, None) == 0


@BOUNDED
@given(
    workload=workloads(),
    share=st.floats(0, 1),
    policy=st.sampled_from(["keep", "reverse"]),
    chunk_share=st.floats(0, 1),
)
def test_the_longest_sequence_is_exact_for_the_user_s_chunks(
    workload: Workload, share: float, policy: Any, chunk_share: float
) -> None:
    policy = None if workload.model.attention == "softmax" else policy
    chunking = Chunking(max(1, int(chunk_share * workload.train.sequence_length)), policy)
    least = smallest_cap(workload, chunking=chunking)
    shortest = smallest_cap(changed(workload, sequence_length=1), chunking=Chunking(1, policy))
    assume(shortest < least)
    assert_longest(workload, int(shortest + share * (least - 1 - shortest)), chunking)


@BOUNDED
@given(workload=workloads(), share=st.floats(0, 1))
def test_what_is_suggested_would_fit(workload: Workload, share: float) -> None:
    train = workload.train
    ways: dict[str, tuple[bool, dict[str, Any]]] = {
        "adafactor": (train.optimizer.name == "adamw", {"optimizer": replace(train.optimizer, name="adafactor")}),
        "bfloat16": (train.precision == "float32", {"precision": "bfloat16"}),
        "lora": (train.lora is None, {"lora": LoraConfig()}),
    }
    cap = int((1 - 0.3 * share) * smallest_cap(workload)) - 1
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(workload, cap, CALIBRATION)
    for name, (is_other, change) in ways.items():
        suggested = any(f'"{name}"' in suggestion for suggestion in caught.value.suggestions)
        assert suggested == (is_other and fits(changed(workload, **change), cap))


def test_adapters_for_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="targets: no linear layer 'output'"):
        plan_job(changed(PTB, lora=LoraConfig(targets=("output",))), NO_CAP, CALIBRATION)


@BOUNDED
@given(workload=workloads())
def test_the_longest_sequence_of_a_plan_fits_and_no_longer_one(workload: Workload) -> None:
    cap = int(1.1 * smallest_cap(workload))
    longest = plan_job(workload, cap, CALIBRATION).max_sequence_length
    assert longest >= workload.train.sequence_length
    assert fits(changed(workload, sequence_length=longest), cap)
    if longest < LONGEST_SEQUENCE:
        assert not fits(changed(workload, sequence_length=longest + 1), cap)


def test_the_gradient_is_checked_against_the_whole_sequence_where_it_fits() -> None:
    alone = changed(PTB, batch_size=1)
    whole = plan_job(alone, NO_CAP, CALIBRATION, Chunking(16_384)).predicted_peak_bytes
    assert plan_job(alone, whole, CALIBRATION, Chunking(512)).check_chunk_length == 16_384
    assert plan_job(alone, whole - 1, CALIBRATION, Chunking(512)).check_chunk_length == 256
    assert plan_job(alone, whole, CALIBRATION, Chunking(16_384)).check_chunk_length == 8_192
    single = changed(alone, sequence_length=1)
    assert plan_job(single, NO_CAP, CALIBRATION).check_chunk_length is None


def test_finished_jobs_move_times_and_nothing_else() -> None:
    plan = plan_job(PTB, NO_CAP, CALIBRATION)
    slower = plan_job(PTB, NO_CAP, replace(CALIBRATION, time_factor=3.0))
    assert slower.predicted_step_seconds == pytest.approx(3 * plan.predicted_step_seconds)
    assert (slower.chunk_length, slower.predicted_peak_bytes) == (plan.chunk_length, plan.predicted_peak_bytes)
    assert (plan.time_factor, slower.time_factor) == (1.0, 3.0)


def test_what_jobs_held_beyond_their_plans_is_counted_with_and_named() -> None:
    taught = replace(CALIBRATION, peak_excess_bytes=30 * MIB, version=4)
    plain, counting = (plan_job(PTB, NO_CAP, calibration) for calibration in (CALIBRATION, taught))
    assert counting.breakdown == replace(plain.breakdown, learned=30 * MIB)
    assert counting.breakdown.total == counting.predicted_peak_bytes == plain.predicted_peak_bytes + 30 * MIB
    assert counting.minimum_cap_bytes == plain.minimum_cap_bytes + 30 * MIB
    assert counting.unchunked_peak_bytes == plain.unchunked_peak_bytes + 30 * MIB
    assert (plain.calibration_version, counting.calibration_version) == (0, 4)
    assert "30 MiB of that are what earlier jobs of this model held beyond their plans." in counting.reason
    assert "earlier jobs" not in plain.reason


def test_what_others_taught_refuses_no_job_that_would_fit_without() -> None:
    taught = replace(CALIBRATION, peak_excess_bytes=300 * MIB)
    least = smallest_cap(PTB)
    with pytest.raises(MemoryCapInfeasibleError):
        plan_job(PTB, least, taught)
    assert plan_with_lessons(PTB, least, taught) == plan_job(PTB, least, CALIBRATION)
    assert plan_with_lessons(PTB, NO_CAP, taught) == plan_job(PTB, NO_CAP, taught)
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_with_lessons(PTB, least - 1, taught)
    assert caught.value.minimum_cap_bytes == least


def test_no_model_fits_below_the_runtime() -> None:
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(PTB, CALIBRATION.runtime_bytes, CALIBRATION)
    assert caught.value.max_sequence_length == 0
    assert "no model fits" in caught.value.suggestions[-1]
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(PTB, CALIBRATION.runtime_bytes + 10 * MIB, CALIBRATION)
    assert "smaller model" in caught.value.suggestions[-1]


@pytest.mark.parametrize("policy", ["keep", "reverse"])
@pytest.mark.parametrize("chunk_length", [1, 777, 16_383, 16_384])
def test_the_user_s_chunks_are_honoured(chunk_length: int, policy: Any) -> None:
    plan = plan_job(PTB, NO_CAP, CALIBRATION, Chunking(chunk_length, policy))
    assert plan.chunk_length == chunk_length
    assert plan.num_chunks == 1 or plan.state_policy == policy
    assert {point.chunk_length for point in plan.frontier} == {chunk_length}
    assert "asked for" in plan.reason


def test_the_user_s_chunks_may_be_what_does_not_fit() -> None:
    cap = smallest_cap(PTB)
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(PTB, cap, CALIBRATION, Chunking(16_384))
    assert any("auto" in suggestion for suggestion in caught.value.suggestions)
    assert caught.value.minimum_cap_bytes > cap
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(PTB, cap - 1, CALIBRATION, Chunking(16_384))
    assert not any("auto" in suggestion for suggestion in caught.value.suggestions)


@pytest.mark.parametrize("chunk_length", [0, -1, 16_385])
def test_impossible_chunks_are_refused(chunk_length: int) -> None:
    with pytest.raises(ValueError, match="chunk_length"):
        plan_job(PTB, NO_CAP, CALIBRATION, Chunking(chunk_length))


@pytest.mark.parametrize("limit", [1, 15, 16, 100, 1024, 16_383, 16_384, 65_535, 65_536, 99_999])
def test_no_more_positions_at_once_than_the_limit(limit: int) -> None:
    free = plan_job(PTB, NO_CAP, CALIBRATION)
    limited = plan_job(PTB, NO_CAP, CALIBRATION, max_positions=limit)
    assert limited.chunk_length * limited.micro_batch_size <= limit
    assert all(point.chunk_length * point.micro_batch_size <= limit for point in limited.frontier)
    assert limited.predicted_step_seconds >= free.predicted_step_seconds
    own = plan_job(PTB, NO_CAP, CALIBRATION, Chunking(2048), max_positions=limit)
    assert own.chunk_length == min(limit, 2048)
    assert own.chunk_length * own.micro_batch_size <= limit


def test_softmax_attention_is_planned_with_its_keys_and_values() -> None:
    """They are all that grows with the sequence, beside the token ids; without a gradient in the first layer where
    nothing below has an adapter."""
    numbers = 2 * 30 * 2 * 3 * 64  # of a position: keys and values of a micro-batch of one, and their gradients
    short, long = (
        plan_job(changed(SMOLLM2, sequence_length=length, batch_size=1), NO_CAP, CALIBRATION, Chunking(256))
        for length in (2_048, 65_536)
    )
    assert (short.state_policy, long.state_policy) == ("prefix", "prefix")
    assert short.breakdown.states == 4 * numbers * 2_048
    grown = long.predicted_peak_bytes - short.predicted_peak_bytes
    assert grown == pytest.approx(4 * (numbers + 1) * 63_488, rel=0.03)
    half = changed(SMOLLM2, precision="bfloat16", batch_size=1)
    assert plan_job(half, NO_CAP, CALIBRATION, Chunking(256)).breakdown.states == 3 * numbers * 2_048
    queries = changed(SMOLLM2, lora=LoraConfig(targets=("query",)), batch_size=1)
    states = plan_job(queries, NO_CAP, CALIBRATION, Chunking(256)).breakdown.states
    assert states == (30 + 29) * 4 * 2 * 3 * 64 * 2_048


def test_the_longest_sequence_ends_with_the_learned_positions() -> None:
    gpt2 = replace(PTB, model=replace(PTB.model, attention="softmax", positions="learned", max_positions=20_000))
    assert plan_job(gpt2, NO_CAP, CALIBRATION).max_sequence_length == 20_000
    assert plan_job(changed(gpt2, packing="packed"), NO_CAP, CALIBRATION).max_sequence_length > 20_000


def test_a_transformer_that_does_not_fit_may_do_so_as_a_performer() -> None:
    long = changed(SMOLLM2, sequence_length=1 << 20)
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(long, 2048 * MIB, CALIBRATION)
    (other,) = (each for each in caught.value.suggestions if "performer" in each)
    assert other.startswith('set attention to "performer"')
    performer = replace(long, model=replace(LLAMA, attention="performer", feature_map="favor"))
    assert f"needs {smallest_cap(performer) / MIB:.0f} MiB" in other
    with pytest.raises(MemoryCapInfeasibleError) as caught:
        plan_job(long, 300 * MIB, CALIBRATION)
    assert not any("performer" in each for each in caught.value.suggestions)


@pytest.mark.parametrize(("workload", "policy"), [(SMOLLM2, "keep"), (SMOLLM2, "reverse"), (PTB, "prefix")])
def test_a_policy_of_another_attention_is_refused(workload: Workload, policy: Any) -> None:
    with pytest.raises(ValueError, match="state_policy"):
        plan_job(workload, NO_CAP, CALIBRATION, Chunking(64, policy))


HARD = changed(PTB, sequence_length=1 << 24, batch_size=1 << 16)
"""Of all requests that the API takes, one with the most schedules."""
HARD_SOFTMAX = changed(SMOLLM2, sequence_length=1 << 24, batch_size=1 << 16)


@pytest.mark.parametrize("workload", [HARD, HARD_SOFTMAX], ids=["performer", "softmax"])
@pytest.mark.parametrize("cap", [260 * MIB, 1 << 43])
@pytest.mark.parametrize("chunking", [None, Chunking(4096)])
def test_a_plan_takes_few_evaluations(
    monkeypatch: pytest.MonkeyPatch, workload: Workload, cap: int, chunking: Chunking | None
) -> None:
    """The API has 20 ms for an answer. All schedules and all suggestions were 5,561 evaluations of 25 µs."""
    evaluated: list[Schedule] = []

    def counted(workload: Workload, schedule: Schedule, calibration: Calibration) -> MemoryBreakdown:
        evaluated.append(schedule)
        return predict_peak(workload, schedule, calibration)

    monkeypatch.setattr(considered, "predict_peak", counted)
    assert fits(workload, cap, chunking=chunking) == (cap == 1 << 43)
    assert len(evaluated) <= 160


@pytest.mark.parametrize("base", [PTB, SMOLLM2, changed(PTB, packing="packed")], ids=["ptb", "smollm2", "packed"])
@pytest.mark.parametrize("batch_size", [2, 8, 16, 64])
@pytest.mark.parametrize("sequence_length", [96, 2_048, 16_384])
def test_no_schedule_that_is_left_out_would_win(base: Workload, batch_size: int, sequence_length: int) -> None:
    """Several sequences at once in chunks: one with longer chunks does the same in less memory."""
    workload = changed(base, batch_size=batch_size, sequence_length=sequence_length)
    everything = [
        considered.candidate(workload, schedule, CALIBRATION)
        for exponent in range(4, sequence_length.bit_length())
        for length in {1 << exponent, min(3 << exponent - 1, sequence_length), sequence_length}
        for chunking in [Chunking(length, policy) for policy in considered.allowed_policies(workload)]
        for schedule in considered.schedules(workload, chunking, None)
    ]
    assert any(c.schedule.micro_batch_size > 1 and c.schedule.chunk_length < sequence_length for c in everything)
    for cap in sorted(c.peak_bytes for c in everything)[::5]:
        plan = plan_job(workload, cap, CALIBRATION)
        fastest = min(c.step_seconds for c in everything if c.peak_bytes <= cap)
        assert plan.predicted_step_seconds <= fastest * 1.02


def test_a_tight_cap_splits_the_batch_and_a_loose_one_does_not() -> None:
    workload = changed(PTB, batch_size=8)
    own = Chunking(1024, "reverse")
    tight = plan_job(workload, smallest_cap(workload, chunking=own), CALIBRATION, own)
    assert (tight.micro_batch_size, tight.accumulation_steps) == (1, 8)
    loose = plan_job(workload, NO_CAP, SLOW_CALLS, Chunking(16, "reverse"))
    assert (loose.micro_batch_size, loose.accumulation_steps) == (8, 1)
    odd = plan_job(changed(PTB, batch_size=5), NO_CAP, SLOW_CALLS, Chunking(16, "reverse"))
    assert (odd.micro_batch_size, odd.accumulation_steps) == (5, 1)


def test_memory_depends_on_the_chunk_and_not_on_the_sequence() -> None:
    """But for tokens and targets, 4 bytes each."""
    own = Chunking(512, "reverse")
    short, long = (
        plan_job(changed(PTB, sequence_length=length, batch_size=1), NO_CAP, CALIBRATION, own).predicted_peak_bytes
        for length in (4_096, 16 * 4_096)
    )
    assert 0 < long - short <= 1.2 * 8 * 15 * 4_096
    keep = plan_job(changed(PTB, batch_size=1), NO_CAP, CALIBRATION, Chunking(512, "keep"))
    reverse = plan_job(changed(PTB, batch_size=1), NO_CAP, CALIBRATION, own)
    state = 3 * 8 * 64 * 65
    # `reverse` keeps the initial states, in float64.
    assert keep.breakdown.states - reverse.breakdown.states == (4 * 31 - 8) * state


def test_calibration_moves_the_prediction() -> None:
    plan = plan_job(PTB, NO_CAP, CALIBRATION, Chunking(512))
    heavier = replace(CALIBRATION, runtime_bytes=CALIBRATION.runtime_bytes + MIB)
    assert plan_job(PTB, NO_CAP, heavier, Chunking(512)).predicted_peak_bytes == plan.predicted_peak_bytes + MIB
    faster = replace(
        CALIBRATION,
        float32=uniform_costs(16e10, 2e9, 5e-6),
        overheads=Overheads(5e-5, 1e-4, 5e-5, 1e-4),
        adamw=Update(5e-5, 5e-6, 5e-10),
    )
    half = plan_job(PTB, NO_CAP, faster, Chunking(512)).predicted_step_seconds
    assert half == pytest.approx(plan.predicted_step_seconds / 2)
    cautious = plan_job(PTB, NO_CAP, default_calibration(), Chunking(512))
    assert cautious.calibration_source == "default"
    assert cautious.predicted_peak_bytes > plan.predicted_peak_bytes


def test_more_chunks_are_more_work() -> None:
    """Full 3 forwards, chunked 3 + (N - 1) / N of pass 1; many short ones pay their overhead."""
    free = replace(CALIBRATION, overheads=Overheads(0.0, 0.0, 0.0, 0.0))
    seconds = [
        plan_job(PTB, NO_CAP, free, Chunking(length, "keep")).predicted_step_seconds for length in (16_384, 4_096, 256)
    ]
    assert seconds == sorted(seconds)
    assert 1.15 < seconds[2] / seconds[0] < 1.34
    one = plan_job(PTB, NO_CAP, SLOW_CALLS, Chunking(16, "keep"))
    other = plan_job(PTB, NO_CAP, free, Chunking(16, "keep"))
    layers = 3
    calls = one.accumulation_steps * ((one.num_chunks - 1) * (layers - 1 / 2) + one.num_chunks * layers * 2)
    assert one.predicted_step_seconds - other.predicted_step_seconds == pytest.approx(calls * 0.05)


def test_plans_and_their_like_survive_json() -> None:
    plan = plan_job(PTB, NO_CAP, CALIBRATION)
    assert len(plan.frontier) > 1
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Calibration.from_json(json.loads(json.dumps(CALIBRATION.to_json()))) == CALIBRATION
    train = TrainConfig(
        sequence_length=8, batch_size=2, steps=3, evaluate_every=2, early_stopping=EarlyStoppingConfig(patience=4)
    )
    assert TrainConfig.from_json(json.loads(json.dumps(train.to_json()))) == train
    for model in BUILTIN_MODELS.values():
        assert ModelConfig.from_json(json.loads(json.dumps(model.to_json()))) == model


MODEL = {"num_layers": 1, "model_width": 8, "num_heads": 2, "mlp_width": 8}
TRAIN = {"sequence_length": 8, "batch_size": 1, "steps": 1}


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        *((ModelConfig, MODEL | {name: 0}, name) for name in [*MODEL, "vocab_size"]),
        (ModelConfig, MODEL | {"model_width": 9}, "model_width"),
        (ModelConfig, MODEL | {"model_width": 9, "num_heads": 3}, "model_width"),
        (ModelConfig, MODEL | {"vocab_size": 2**31}, "vocab_size"),
        (ModelConfig, MODEL | {"feature_map": "cubed"}, "feature_map"),
        (ModelConfig, MODEL | {"norm": "none"}, "norm"),
        (ModelConfig, MODEL | {"num_features": 8}, "num_features"),
        (ModelConfig, MODEL | {"feature_map": "favor", "num_features": 0}, "num_features"),
        (ModelConfig, MODEL | {"attention_epsilon": 0.0}, "attention_epsilon"),
        (ModelConfig, MODEL | {"num_layers": 1.5}, "num_layers"),
        (ModelConfig, MODEL | {"num_layers": True}, "num_layers"),
        (ModelConfig, MODEL | {"num_layers": "1"}, "num_layers"),
        (ModelConfig, MODEL | {"output_projection": 1}, "output_projection"),
        (ModelConfig, MODEL | {"dropout": 0.1}, "dropout"),
        (ModelConfig, {"model_width": 8}, "mlp_width"),
        (OptimizerConfig, {"name": "adam"}, "name"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
        (OptimizerConfig, {"learning_rate": 10.1}, "learning_rate"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
        (OptimizerConfig, {"beta1": 1.0}, "beta1"),
        (OptimizerConfig, {"beta2": 1.0}, "beta2"),
        (OptimizerConfig, {"epsilon": 0.0}, "epsilon"),
        (ScheduleConfig, {"name": "linear"}, "name"),
        (ScheduleConfig, {"warmup_steps": -1}, "warmup_steps"),
        (ScheduleConfig, {"final_fraction": 1.1}, "final_fraction"),
        (EarlyStoppingConfig, {"patience": 0}, "patience"),
        (EarlyStoppingConfig, {"min_delta": -1.0}, "min_delta"),
        *((TrainConfig, TRAIN | {name: 0}, name) for name in [*TRAIN, "evaluate_sequences", "evaluate_every"]),
        (TrainConfig, TRAIN | {"checkpoint_every": 0}, "checkpoint_every"),
        (TrainConfig, TRAIN | {"gradient_clip": 0.0}, "gradient_clip"),
        (TrainConfig, TRAIN | {"early_stopping": {}}, "early_stopping"),
        (TrainConfig, TRAIN | {"early_stopping": 3}, "early_stopping"),
        (TrainConfig, TRAIN | {"seed": -1}, "seed"),
        (TrainConfig, TRAIN | {"seed": 2**63}, "seed"),
        (TrainConfig, TRAIN | {"optimizer": {"lr": 1.0}}, "lr"),
    ],
)
def test_a_bad_field_is_named(make: Any, fields: dict[str, Any], named: str) -> None:
    build: Callable[[dict[str, Any]], object] = make.from_json
    with pytest.raises(ValueError, match=rf"\b{named}\b"):
        build(fields)


def test_good_fields_are_taken() -> None:
    assert ModelConfig.from_json(MODEL) == ModelConfig(num_layers=1, model_width=8, num_heads=2, mlp_width=8)
    assert TrainConfig.from_json(TRAIN | {"optimizer": {"learning_rate": 1}}).optimizer.learning_rate == 1.0
    assert TrainConfig.from_json(TRAIN | {"gradient_clip": None}).gradient_clip is None


@pytest.mark.parametrize("module", ["slim_core", "slim_core.config", "slim_core.planning"])
def test_planning_needs_no_tensor_library(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{n.split('.')[0] for n in sys.modules}} & {{'torch', 'numpy'}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
