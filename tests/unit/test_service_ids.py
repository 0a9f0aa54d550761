from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.ids import is_id, new_id, uuid7


def test_ids_of_one_thread_sort_by_creation() -> None:
    ids = [new_id("job") for _ in range(20_000)]  # far more than there are clock ticks in the time this takes
    assert ids == sorted(set(ids))


def test_ids_sort_even_while_the_clock_stands_or_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    ids = [new_id("job") for _ in range(10_000)]
    monkeypatch.setattr(time, "time_ns", lambda: now - 10**9)
    ids += [new_id("job") for _ in range(10)]
    assert ids == sorted(set(ids))


def test_ids_of_many_threads_are_distinct() -> None:
    with ThreadPoolExecutor(8) as pool:
        batches = list(pool.map(lambda _: [uuid7() for _ in range(2_000)], range(8)))
    assert len({value for batch in batches for value in batch}) == 16_000
    assert all(batch == sorted(batch) for batch in batches)


def test_the_bits_are_those_of_rfc_9562() -> None:
    value = uuid7()
    assert value.version == 7
    assert value.variant == "specified in RFC 4122"
    assert abs((value.int >> 80) - time.time() * 1000) < 5_000


@pytest.mark.parametrize(
    "text",
    ["", "job_", "job_xyz", "ds_" + "0" * 32, "job_" + "0" * 31, "job_" + "A" * 32, "job_" + "0" * 32 + "\n", "\0"],
)
def test_what_is_no_job_id_is_told_apart(text: str) -> None:
    assert not is_id("job", text)
    assert is_id("job", new_id("job"))
