"""What a device starts next, on a real database: room, turns, reservations, and the cost of a long queue.

Seen to fail without what they are about: the slots that look at once without the lock on the device's row, what only
the machine knows of without `held_here`, the drain without its fixed moment, the past of a tenant without
`usage.charge`.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from sqlalchemy import Engine, select, text

from service import claims, devices, jobs, runs
from service.database import transaction
from service.devices import Announcement
from service.errors import MemoryCapExceedsDeviceError
from service.models import Dataset, Device, Job
from service.runs import ClaimedJob
from service.storage import Storage
from tests.integration.seed import LEASE_SECONDS, add_dataset, add_job

MIB = 1 << 20
DEVICE, OTHER = "cpu-here", "cpu-there"


@pytest.fixture
def dataset(bind: Engine, storage: Storage) -> Dataset:
    return add_dataset(bind, storage)


@pytest.fixture(autouse=True)
def device(bind: Engine) -> None:
    announce(bind, DEVICE, 1_000 * MIB)


def announce(bind: Engine, device_id: str, memory_bytes: int, slots: int = 4) -> None:
    with transaction(bind) as session:
        devices.announce(session, Announcement(device_id, "cpu", memory_bytes, slots), "worker@here")


def add(bind: Engine, dataset: Dataset, mebibytes: int, tenant: str = "default", steps: int = 10) -> str:
    """Of half a second a step, by its plan."""
    return add_job(bind, dataset.id, memory_cap_bytes=mebibytes * MIB, tenant=tenant, steps=steps).id


def take(bind: Engine, device_id: str = DEVICE, **options: Any) -> ClaimedJob | None:
    with transaction(bind) as session:
        return claims.next_job(session, device_id, "worker-1", lease_seconds=LEASE_SECONDS, **options)


def taken(bind: Engine, device_id: str = DEVICE, **options: Any) -> str | None:
    job = take(bind, device_id, **options)
    return None if job is None else job.id


def end(bind: Engine, job_id: str) -> None:
    with transaction(bind) as session:
        runs.finish(session, job_id, 1, "cancelled")


def state(bind: Engine, job_id: str) -> Job:
    with transaction(bind) as session:
        return jobs.get(session, job_id)


def reserved_for(bind: Engine, device_id: str = DEVICE) -> str | None:
    with transaction(bind) as session:
        return session.scalars(select(Device.reserved_for).where(Device.id == device_id)).one()


def test_jobs_start_in_order_while_the_sum_of_their_caps_fits(bind: Engine, dataset: Dataset) -> None:
    first, second, third, small = (add(bind, dataset, size) for size in (400, 400, 300, 100))
    assert [taken(bind) for _ in range(3)] == [first, second, None]  # nor does the small one pass its tenant's older
    row = state(bind, first)
    assert (row.device_id, row.charged_bytes, row.status) == (DEVICE, 400 * MIB, "running")
    end(bind, first)
    assert [taken(bind) for _ in range(3)] == [third, small, None]


def test_a_device_that_nobody_announced_takes_nothing(bind: Engine, dataset: Dataset) -> None:
    add(bind, dataset, 1)
    assert taken(bind, OTHER) is None


def test_what_only_the_machine_knows_of_counts_too(bind: Engine, dataset: Dataset) -> None:
    """A trainer whose job was given to another attempt and that has not ended yet."""
    first, second = (add(bind, dataset, 400) for _ in range(2))
    assert taken(bind, held_here=lambda: {(second, 1): 700 * MIB}) is None
    assert taken(bind, held_here=lambda: {(second, 1): 600 * MIB}) == first
    # The same attempt in both places is one.
    assert taken(bind, held_here=lambda: {(first, 1): 400 * MIB}) == second


def test_tenants_take_turns_by_what_they_hold(bind: Engine, dataset: Dataset) -> None:
    flood = [add(bind, dataset, 200, "flood") for _ in range(4)]
    late = [add(bind, dataset, 200, "late") for _ in range(2)]
    # Both hold the same after two: the one whose job has run for longer is then the second.
    assert [taken(bind) for _ in range(4)] == [flood[0], late[0], late[1], flood[1]]


def test_what_a_tenant_held_counts_when_its_job_has_ended(bind: Engine, dataset: Dataset) -> None:
    old = [add(bind, dataset, 900, "old") for _ in range(2)]
    new = add(bind, dataset, 900, "new")
    assert taken(bind) == old[0]
    with transaction(bind) as session:
        session.execute(text("UPDATE jobs SET claimed_at = claimed_at - interval '1 hour' WHERE status = 'running'"))
    end(bind, old[0])
    with transaction(bind) as session:
        held = session.execute(text("SELECT tenant, held_bytes FROM tenant_usage")).one()
    assert held == ("old", pytest.approx(900 * MIB * 0.632, rel=1e-2))
    assert taken(bind) == new


@pytest.mark.parametrize("ago", ["60 days", "-60 days"])
def test_an_account_of_long_ago_or_of_a_clock_set_back_stops_nothing(bind: Engine, dataset: Dataset, ago: str) -> None:
    """PostgreSQL's exp() raises an error on underflow."""
    first, second, third = (add(bind, dataset, 300, "old") for _ in range(3))
    for job_id in (first, second):
        assert taken(bind) == job_id
    end(bind, first)
    with transaction(bind) as session:
        session.execute(text(f"UPDATE tenant_usage SET updated_at = now() - interval '{ago}'"))
        session.execute(text("UPDATE jobs SET lease_until = now() - interval '1 s' WHERE status = 'running'"))
        assert runs.requeue_expired(session) == [second]
    assert taken(bind) == second
    assert taken(bind) == third


def test_a_large_job_gets_the_device_after_its_patience(bind: Engine, dataset: Dataset) -> None:
    running = add(bind, dataset, 300, "a")
    assert taken(bind) == running
    large = add(bind, dataset, 800, "b")
    small = [add(bind, dataset, 100, "a", steps=1_000) for _ in range(3)]
    assert taken(bind) == small[0]  # passes it
    assert state(bind, large).blocked_since is not None
    assert taken(bind, patience_seconds=0) is None
    assert reserved_for(bind) == large
    end(bind, running)
    end(bind, small[0])
    assert taken(bind, patience_seconds=0) == large
    assert (reserved_for(bind), state(bind, large).blocked_since) == (None, None)
    assert taken(bind, patience_seconds=0) == small[1]


def test_what_ends_in_time_starts_while_the_device_drains(bind: Engine, dataset: Dataset) -> None:
    running = add(bind, dataset, 300, "a", steps=100)
    assert taken(bind) == running
    large = add(bind, dataset, 800, "b")
    quick, slow = add(bind, dataset, 100, "c", steps=50), add(bind, dataset, 100, "d", steps=50)
    assert taken(bind) == quick
    with transaction(bind) as session:  # it is at step 90, ten times as slow as planned: 50 seconds more
        session.execute(text("UPDATE jobs SET step = 90, step_seconds = 5 WHERE id = :id"), {"id": running})
    assert taken(bind, patience_seconds=0) == slow
    assert reserved_for(bind) == large
    later = add(bind, dataset, 100, "e", steps=50)
    with transaction(bind) as session:  # the moment that was set has come near, whatever is expected now
        session.execute(
            text("UPDATE devices SET reserved_until = now() + interval '20 seconds' WHERE id = :id"), {"id": DEVICE}
        )
    assert taken(bind, patience_seconds=0) is None
    assert state(bind, later).status == "queued"


def test_a_pause_is_the_end_of_a_reservation(bind: Engine, dataset: Dataset) -> None:
    assert taken(bind) is None
    running = add(bind, dataset, 300, "a")
    assert taken(bind) == running
    large, small = add(bind, dataset, 800, "b"), add(bind, dataset, 100, "a")
    assert taken(bind, patience_seconds=0) == small
    with transaction(bind) as session:
        jobs.request(session, large, "pause")
        assert jobs.request(session, large, "resume").blocked_since is None


def test_one_of_two_devices_is_kept_free(bind: Engine, dataset: Dataset) -> None:
    announce(bind, OTHER, 1_000 * MIB)
    for device_id in (DEVICE, OTHER):
        add(bind, dataset, 300, "a")
        assert take(bind, device_id) is not None
    large = add(bind, dataset, 800, "b")
    small = [add(bind, dataset, 100, "a", steps=1_000) for _ in range(2)]
    assert taken(bind) == small[0]
    assert taken(bind, patience_seconds=0) is None
    assert reserved_for(bind) == large
    assert taken(bind, OTHER, patience_seconds=0) == small[1]
    with transaction(bind) as session:  # its worker is gone
        session.execute(
            text("UPDATE devices SET updated_at = now() - interval '1 hour' WHERE id = :id"), {"id": DEVICE}
        )
    assert taken(bind, OTHER, patience_seconds=0) is None
    assert reserved_for(bind, OTHER) == large


def test_a_job_larger_than_the_device_blocks_nobody(bind: Engine, dataset: Dataset) -> None:
    huge = add(bind, dataset, 1_001)
    after = add(bind, dataset, 100)
    assert taken(bind, patience_seconds=0) == after
    announce(bind, OTHER, 2_000 * MIB)
    assert taken(bind, OTHER) == huge


def test_a_job_that_is_being_taken_is_passed(bind: Engine, dataset: Dataset) -> None:
    first, second = (add(bind, dataset, 100) for _ in range(2))
    with transaction(bind) as session:
        assert runs.claim(session, first, "worker-2", LEASE_SECONDS) is not None
        assert taken(bind) == second


def test_many_slots_that_look_at_once_never_overfill_the_device(bind: Engine, dataset: Dataset) -> None:
    for _ in range(5):
        ids = [add(bind, dataset, 400) for _ in range(6)]
        start = threading.Barrier(6)
        won: list[str] = []

        def look(start: threading.Barrier = start, won: list[str] = won) -> None:
            start.wait()
            if (job_id := taken(bind)) is not None:
                won.append(job_id)

        threads = [threading.Thread(target=look) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == ids[:2]
        for job_id in won:
            end(bind, job_id)
        with transaction(bind) as session:
            for job_id in ids[2:]:
                jobs.request(session, job_id, "cancel")


def test_twenty_thousand_queued_jobs_do_not_slow_a_claim(bind: Engine, dataset: Dataset) -> None:
    template = add(bind, dataset, 100)
    columns = "name, desired, spec, train, model_config, plan, dataset_id, model, total_steps, predicted_peak_bytes"
    with transaction(bind) as session:
        session.execute(
            text(
                f"INSERT INTO jobs (id, tenant, status, memory_cap_bytes, {columns}) "
                "SELECT 'job_x' || to_char(n, 'FM000000'), 'tenant_' || CASE WHEN n % 100 = 0 THEN n % 17 ELSE 0 END, "
                f"CASE WHEN n > 20000 THEN 'succeeded' ELSE 'queued' END, memory_cap_bytes, {columns} "
                "FROM jobs, generate_series(1, 30000) AS n WHERE id = :template"
            ),
            {"template": template},
        )
    with transaction(bind) as session:
        session.execute(text("ANALYZE jobs"))
        plan = session.scalar(
            text(f"EXPLAIN (FORMAT JSON) {claims.heads().text}"), {"memory_bytes": 1_000 * MIB, "missed": []}
        )
    shown = json.dumps(plan)
    assert '"Index Name": "jobs_queued"' in shown
    assert '"Seq Scan"' not in shown
    began = time.perf_counter()
    claimed = [taken(bind) for _ in range(3)]
    assert (time.perf_counter() - began) / 3 < 0.1
    assert None not in claimed


def test_announcements_are_listed_with_what_runs(bind: Engine, dataset: Dataset) -> None:
    announce(bind, OTHER, 2_000 * MIB, slots=2)
    add(bind, dataset, 400)
    assert take(bind) is not None
    with transaction(bind) as session:
        here, there = devices.page(session)
        assert devices.live_slots(session) == 6
    assert (here.id, here.memory_bytes, here.bytes_in_use, here.jobs_running) == (DEVICE, 1_000 * MIB, 400 * MIB, 1)
    assert (there.id, there.bytes_in_use, there.jobs_running, there.slots, there.live) == (OTHER, 0, 0, 2, True)


def test_a_device_long_gone_is_forgotten_unless_something_runs_there(bind: Engine, dataset: Dataset) -> None:
    announce(bind, OTHER, 2_000 * MIB)
    announce(bind, "cpu-third", 4_000 * MIB)
    add(bind, dataset, 400)
    assert take(bind) is not None
    with transaction(bind) as session:
        with pytest.raises(MemoryCapExceedsDeviceError) as refused:
            devices.check_cap(session, 4_001 * MIB)
        assert refused.value.fields["largest_device_bytes"] == 4_000 * MIB
        session.execute(
            text("UPDATE devices SET updated_at = now() - interval '2 days' WHERE id <> :id"), {"id": OTHER}
        )
        with pytest.raises(MemoryCapExceedsDeviceError):
            devices.check_cap(session, 2_001 * MIB)
        devices.check_cap(session, 2_000 * MIB)
    announce(bind, OTHER, 2_000 * MIB)
    with transaction(bind) as session:
        assert [(device.id, device.live) for device in devices.page(session)] == [(DEVICE, False), (OTHER, True)]
