"""The policy of what starts next: its rules one by one, and what follows from them over days of jobs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.packing_simulation import (
    DEVICE_BYTES,
    HOUR,
    Job,
    Policy,
    Simulation,
    a_week,
    fifo,
    held,
    jain,
    largest_sum_of_caps,
    out_of_order,
    without_reservation,
)
from service import packing
from service.packing import Choice, Waiting, choose

PATIENCE = packing.PATIENCE_SECONDS


def test_the_tenant_that_holds_least_goes_first_and_the_older_job_among_equals() -> None:
    old, young = Waiting("job_1", "a", 10), Waiting("job_2", "b", 10)
    assert choose([young, old], {}, free_bytes=10).start is old
    assert choose([young, old], {"a": 1.0}, free_bytes=10).start is young


def test_a_job_that_does_not_fit_is_passed_until_patience_ends() -> None:
    small = Waiting("job_2", "b", 10)
    accounts = {"b": 5.0}
    large = Waiting("job_1", "a", 50)
    assert choose([large, small], accounts, free_bytes=20) == Choice(start=small, blocked=large)
    waits = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE - 1)
    assert choose([waits, small], accounts, free_bytes=20) == Choice(start=small, blocked=waits)
    overdue = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE)
    assert choose([overdue, small], accounts, free_bytes=20) == Choice(reserved=overdue)
    assert choose([overdue, small], accounts, free_bytes=50).start is overdue
    assert choose([overdue, small], {"a": 1e12}, free_bytes=50).start is overdue


def test_a_job_that_is_not_at_its_turn_is_not_blocked() -> None:
    large, small = Waiting("job_1", "a", 50), Waiting("job_2", "b", 10)
    assert choose([large, small], {"a": 1.0}, free_bytes=20) == Choice(start=small)


def test_of_two_that_are_overdue_the_first_blocked_has_the_device() -> None:
    first = Waiting("job_2", "b", 50, blocked_seconds=PATIENCE + 1)
    second = Waiting("job_1", "a", 10, blocked_seconds=PATIENCE)
    assert choose([second, first], {}, free_bytes=20) == Choice(reserved=first)


def test_one_device_is_kept_free_for_a_job_and_others_go_on() -> None:
    elsewhere = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE, reserved_elsewhere=True)
    small = Waiting("job_2", "b", 10)
    assert choose([elsewhere, small], {"b": 1.0}, free_bytes=20).start is small
    assert choose([elsewhere, small], {"b": 1.0}, free_bytes=50).start is elsewhere


def test_nobody_waits() -> None:
    assert choose([], {}, free_bytes=10) == Choice()


@st.composite
def heads(draw: st.DrawFn) -> list[Waiting]:
    """One job of each of some tenants."""
    seconds = st.none() | st.floats(0, 2 * PATIENCE)
    numbers = draw(st.permutations(range(draw(st.integers(0, 6)))))
    return [
        Waiting(f"job_{number}", f"tenant_{index}", draw(st.integers(1, 100)), draw(seconds), draw(st.booleans()))
        for index, number in enumerate(numbers)
    ]


@given(heads(), st.dictionaries(st.sampled_from([f"tenant_{n}" for n in range(6)]), st.floats(0, 1e12)), st.integers())
def test_rules_that_hold_whoever_waits(waiting: list[Waiting], accounts: dict[str, float], free_bytes: int) -> None:
    choice = choose(waiting, accounts, free_bytes)
    fitting = [job for job in waiting if job.memory_cap_bytes <= free_bytes]
    if choice.start is not None:
        assert choice.start in fitting
    if choice.reserved is not None:
        assert choice.start in (None, choice.reserved)
        assert choice.blocked is None
        return
    assert (choice.start is None) == (fitting == [])  # nothing idles that has room for something
    if choice.start is not None:
        mine = accounts.get(choice.start.tenant, 0.0)
        assert all(mine <= accounts.get(job.tenant, 0.0) for job in fitting)
    if choice.blocked is not None:
        assert choice.blocked not in fitting
        theirs = accounts.get(choice.blocked.tenant, 0.0)
        assert all(theirs <= accounts.get(job.tenant, 0.0) for job in waiting)


def test_an_account_has_what_is_held_and_what_was() -> None:
    hour = packing.MEMORY_SECONDS
    assert packing.account(0.0, []) == 0.0
    assert packing.account(5.0, [(100, 0.0)]) == 105.0
    assert packing.account(0.0, [(100, 1e9)]) == pytest.approx(200.0)
    # A run in two parts, the first of which has ended, is remembered as the whole is.
    parts = packing.forgotten(packing.remembered(100, hour), 2 * hour) + packing.remembered(100, 2 * hour)
    assert parts == pytest.approx(packing.remembered(100, 3 * hour))


def test_a_job_counts_as_its_slots_share_at_least() -> None:
    assert packing.charged_bytes(10, 1_000, slots=4) == 250
    assert packing.charged_bytes(500, 1_000, slots=4) == 500


@st.composite
def queues(draw: st.DrawFn) -> list[Job]:
    """Jobs of some tenants in order of arrival, each of which fits an empty device of 100 bytes."""
    arrivals = sorted(draw(st.lists(st.floats(0, 5_000), max_size=40)))
    tenant, cap, seconds = st.sampled_from("abcd"), st.integers(1, 100), st.floats(1, 3_000)
    return [
        Job(f"job_{number:03}", draw(tenant), draw(cap), draw(seconds), arrived_at)
        for number, arrived_at in enumerate(arrivals)
    ]


@settings(deadline=None)
@given(queues(), st.integers(1, 5))
def test_whatever_arrives_fits_in_order_and_is_not_kept_waiting(jobs: list[Job], slots: int) -> None:
    simulation = Simulation(choose, device_bytes=100, slots=slots)
    runs = simulation.run(jobs)
    assert sorted(run.job.id for run in runs) == [job.id for job in jobs]
    assert largest_sum_of_caps(runs) <= 100
    assert out_of_order(runs) == 0
    # After its patience, a blocked job waits for the next look, and for those that were blocked before it, one of each
    # tenant at most; each of them waits for what runs.
    longest = max((job.seconds for job in jobs), default=0.0)
    for run in runs:
        if run.job.id in simulation.blocked_at:
            waited = run.started_at - simulation.blocked_at[run.job.id]
            assert waited <= PATIENCE + 6 * longest


BACKLOGGED = ("flood", "short", "long", "wide")


def shares(policy: Policy) -> list[float]:
    runs = Simulation(policy).run(a_week(seed=11, scale=0.3))
    totals = held(runs, HOUR, 10 * HOUR)
    return [totals.get(tenant, 0.0) for tenant in BACKLOGGED]


def test_two_thousand_jobs_share_a_device_fairly_and_one_queue_would_not() -> None:
    assert len(a_week(seed=11, scale=0.3)) > 2_000
    assert jain(shares(choose)) > 0.95
    assert jain(shares(fifo)) < 0.3


def waits_of_the_large(policy: Policy) -> float:
    """The longest, in hours."""
    runs = Simulation(policy).run(a_week(seed=11, scale=0.3))
    assert largest_sum_of_caps(runs) <= DEVICE_BYTES
    assert out_of_order(runs) == 0
    return max(run.waited for run in runs if run.job.tenant == "large") / HOUR


def test_a_large_job_starts_among_thousands_and_would_starve_without_its_reservation() -> None:
    assert waits_of_the_large(choose) < 12
    assert waits_of_the_large(without_reservation) > 24
