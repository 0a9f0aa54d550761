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
from service.packing import Choice, Running, Waiting, choose

PATIENCE = packing.PATIENCE_SECONDS


def pick(waiting: list[Waiting], accounts: dict[str, float] | None = None, *, free: int) -> Choice:
    """Of a device of 100 bytes, the rest of which is held by one job for 60 more seconds."""
    return choose(waiting, [Running(100 - free, 60.0)], accounts or {}, device_bytes=100)


def test_the_tenant_that_holds_least_goes_first_and_the_older_job_among_equals() -> None:
    old, young = Waiting("job_1", "a", 10), Waiting("job_2", "b", 10)
    assert pick([young, old], free=10).start is old
    assert pick([young, old], {"a": 1.0}, free=10).start is young


def test_a_job_that_does_not_fit_is_passed_until_patience_ends() -> None:
    small = Waiting("job_2", "b", 10)
    accounts = {"b": 5.0}
    large = Waiting("job_1", "a", 50)
    assert pick([large, small], accounts, free=20) == Choice(start=small, blocked=large)
    waits = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE - 1)
    assert pick([waits, small], accounts, free=20) == Choice(start=small, blocked=waits)
    overdue = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE)
    assert pick([overdue, small], accounts, free=20) == Choice(reserved=overdue, drain_seconds=60.0)
    assert pick([overdue, small], accounts, free=50).start is overdue
    assert pick([overdue, small], {"a": 1e12}, free=50).start is overdue


def test_what_promises_to_end_in_time_may_start_before_it() -> None:
    overdue = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE)
    quick, slow = (Waiting(f"job_{n}", "b", 10, expected_seconds=seconds) for n, seconds in ((2, 60.0), (3, 61.0)))
    assert pick([overdue, quick], free=20) == Choice(start=quick, reserved=overdue, drain_seconds=60.0)
    assert pick([overdue, slow], free=20).start is None
    # The moment was set when the device began to be kept free: later promises do not move it.
    draining = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE, drain_seconds=59.0)
    assert pick([draining, quick], free=20) == Choice(reserved=draining, drain_seconds=59.0)


def test_the_device_drains_until_enough_has_ended_in_the_order_of_their_ends() -> None:
    running = [Running(30, 500.0), Running(20, 10.0), Running(30, 100.0)]
    waits = {size: Waiting("job_1", "a", size, blocked_seconds=PATIENCE) for size in (40, 41, 70, 100)}
    drains = {size: choose([job], running, {}, device_bytes=100).drain_seconds for size, job in waits.items()}
    assert drains == {40: 10.0, 41: 100.0, 70: 100.0, 100: 500.0}


def test_a_job_that_is_not_at_its_turn_is_not_blocked() -> None:
    large, small = Waiting("job_1", "a", 50), Waiting("job_2", "b", 10)
    assert pick([large, small], {"a": 1.0}, free=20) == Choice(start=small)


def test_of_two_that_are_overdue_the_first_blocked_has_the_device() -> None:
    first = Waiting("job_2", "b", 50, blocked_seconds=PATIENCE + 1)
    second = Waiting("job_1", "a", 10, blocked_seconds=PATIENCE)
    assert pick([second, first], free=20) == Choice(reserved=first, drain_seconds=60.0)


def test_one_device_is_kept_free_for_a_job_and_others_go_on() -> None:
    elsewhere = Waiting("job_1", "a", 50, blocked_seconds=PATIENCE, reserved_elsewhere=True)
    small = Waiting("job_2", "b", 10)
    assert pick([elsewhere, small], {"b": 1.0}, free=20).start is small
    assert pick([elsewhere, small], {"b": 1.0}, free=50).start is elsewhere


def test_nobody_waits() -> None:
    assert pick([], free=10) == Choice()


@st.composite
def heads(draw: st.DrawFn) -> list[Waiting]:
    """One job of each of some tenants."""
    seconds = st.floats(0, 2 * PATIENCE)
    numbers = draw(st.permutations(range(draw(st.integers(0, 6)))))
    return [
        Waiting(
            f"job_{number}",
            f"tenant_{index}",
            draw(st.integers(1, 100)),
            expected_seconds=draw(seconds),
            blocked_seconds=draw(st.none() | seconds),
            drain_seconds=draw(st.none() | seconds),
            reserved_elsewhere=draw(st.booleans()),
        )
        for index, number in enumerate(numbers)
    ]


@given(heads(), st.dictionaries(st.sampled_from([f"tenant_{n}" for n in range(6)]), st.floats(0, 1e12)), st.integers())
def test_rules_that_hold_whoever_waits(waiting: list[Waiting], accounts: dict[str, float], free: int) -> None:
    choice = pick(waiting, accounts, free=free)
    fitting = [job for job in waiting if job.memory_cap_bytes <= free]
    if choice.start is not None:
        assert choice.start in fitting
    if choice.reserved is not None:
        in_time = [job for job in fitting if job.expected_seconds <= choice.drain_seconds]
        assert choice.start in (None, choice.reserved, *in_time)
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
        Job(f"job_{number:03}", draw(tenant), draw(cap), draw(seconds), draw(seconds), arrived_at)
        for number, arrived_at in enumerate(arrivals)
    ]


@settings(deadline=None)
@given(queues(), st.integers(1, 5))
def test_whatever_arrives_fits_in_order_and_is_not_kept_waiting(jobs: list[Job], slots: int) -> None:
    runs = Simulation(choose, device_bytes=100, slots=slots).run(jobs)
    assert sorted(run.job.id for run in runs) == [job.id for job in jobs]
    assert largest_sum_of_caps(runs) <= 100
    assert out_of_order(runs) == 0
    # After its patience, a blocked job waits for the next look, then for those that were blocked before it, one of each
    # other tenant at most, then for itself: each time until the expected end of what runs, and for what started
    # before that and breaks its promise.
    longest = max((max(job.seconds, job.expected_seconds) for job in jobs), default=0.0)
    assert all(run.blocked_seconds <= PATIENCE + 9 * longest for run in runs)


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
    """The longest from its turn on, in hours."""
    runs = Simulation(policy).run(a_week(seed=11, scale=0.3))
    assert largest_sum_of_caps(runs) <= DEVICE_BYTES
    assert out_of_order(runs) == 0
    return max(run.blocked_seconds for run in runs if run.job.tenant == "large") / HOUR


def test_a_large_job_starts_among_thousands_and_would_starve_without_its_reservation() -> None:
    assert waits_of_the_large(choose) < 12
    assert waits_of_the_large(without_reservation) > 24
