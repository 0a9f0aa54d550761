"""The rate of requests, by a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import rates
from api.rates import MINUTE, Rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(rates, "monotonic", lambda: now[0])
    return now


@given(st.integers(1, 200), st.lists(st.floats(0, 30), max_size=100))
def test_no_minute_has_more_than_twice_the_limit_and_whoever_waits_gets_in(limit: int, pauses: list[float]) -> None:
    now, allowed, counted = 0.0, list[float](), Rates()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "monotonic", lambda: now)
        for pause in [0.0] * limit + pauses:
            now += pause
            turn = counted.take("a", limit)
            if turn.allowed:
                allowed.append(now)
                continue
            now += turn.retry_seconds
            assert counted.take("a", limit).allowed
            allowed.append(now)
    for start in allowed:
        assert sum(start <= time < start + MINUTE for time in allowed) <= 2 * limit


def test_a_crowd_of_names_fills_nothing(clock: list[float]) -> None:
    counted = Rates(capacity=10)
    for number in range(100):
        clock[0] += 0.001
        counted.take(f"address {number}", 60)
    assert len(counted) == 10
    assert not [turn for turn in (counted.take("address 99", 1) for _ in range(3)) if turn.allowed and turn.remaining]


def test_who_looks_before_takes_nothing(clock: list[float]) -> None:
    counted = Rates()
    for allowed in (True, True, False):
        assert [counted.has_turn("a", 2) for _ in range(3)] == [allowed] * 3
        assert counted.take("a", 2).allowed is allowed
    clock[0] += MINUTE / 2
    assert counted.has_turn("a", 2)
