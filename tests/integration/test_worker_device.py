"""Slots, the memory of a device, and runs side by side as the worker sees them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from service import database, devices
from tests.integration.stage import CAP_BYTES, DEVICE_BYTES, Stage, open_stage, wait_for
from worker.device import SHARE, announce, cpu_bytes, discover
from worker.slot import device_slot, whole_device

LONG = 100_000


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path) as stage:
        yield stage


def test_slots_are_as_many_as_said_and_know_of_each_other(tmp_path: Path) -> None:
    with device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0) as first:
        assert first is not None
        assert first.others() == {}
        first.note("job_1", 3, 500)
        with device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0) as second:
            assert second is not None
            assert second.others() == {("job_1", 3): 500}
            assert first.others() == {}  # held, but for nothing yet
            with device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0.15) as third:
                assert third is None
            with device_slot(tmp_path, "cuda-x", slots=1, wait_seconds=0) as another:
                assert another is not None
                assert another.others() == {}
            with whole_device(tmp_path, "cpu-x", slots=2) as idle:
                assert not idle
        second_free = device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0)
        with second_free as again:
            assert again is not None
    with whole_device(tmp_path, "cpu-x", slots=2) as idle:
        assert idle
        with device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0) as slot:
            assert slot is None
    with device_slot(tmp_path, "cpu-x", slots=2, wait_seconds=0) as slot:
        assert slot is not None
        assert slot.others() == {}  # what is written in a slot that nobody holds is of the past


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8 << 30),
        ({"memory.max": "max"}, 8 << 30),
        ({"memory.max": str(3 << 30)}, 3 << 30),
        ({"memory/memory.limit_in_bytes": str(2 << 30)}, 2 << 30),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, 8 << 30),
    ],
)
def test_the_memory_of_a_machine_or_of_its_container(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:       {8 << 20} kB\nMemFree:         100 kB\n")
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(limit + "\n")
    assert cpu_bytes(tmp_path, tmp_path) == expected


def test_a_share_is_left_to_the_system_unless_the_operator_says_how_much(stage: Stage) -> None:
    own = stage.settings.model_copy(update={"device_memory_bytes": None})
    assert discover(own, drivers=()).memory_bytes == int(cpu_bytes() * SHARE)
    found = discover(stage.settings, drivers=())
    assert (found.id, found.kind, found.memory_bytes, found.slots) == (stage.device, "cpu", DEVICE_BYTES, 4)


def test_a_gpu_is_asked_for_its_memory_and_runs_one_job_at_a_time(stage: Stage) -> None:
    own = stage.settings.model_copy(update={"device_memory_bytes": None})
    found = discover(own, drivers=("/dev/null",), query="print('{\"memory_bytes\": 1000}')")
    assert (found.kind, found.memory_bytes, found.slots) == ("cuda", 800, 1)
    for query in ("print('{\"memory_bytes\": null}')", "print('no')", "raise SystemExit(1)"):
        assert discover(own, drivers=("/dev/null",), query=query).kind == "cpu"


def test_an_announcement_is_repeated_and_survives_a_database_that_is_away(stage: Stage) -> None:
    device = discover(stage.settings, drivers=())
    away = database.engine(
        stage.settings.model_copy(update={"database_url": "postgresql+psycopg://x@/x?host=/nowhere"})
    )
    assert not announce(away, device, "again")
    assert announce(stage.bind, device, "again")
    long_ago = text("UPDATE devices SET updated_at = now() - interval '1 day'")
    with database.transaction(stage.bind) as session:
        (shown,) = devices.page(session)
        assert (shown.worker, shown.live) == ("again", True)
        session.execute(long_ago)
    program = (
        "import sys, time; from service import database; from service.settings import load_settings;"
        "from worker.device import discover, keep_announcing; settings = load_settings();"
        "keep_announcing(database.engine(settings), discover(settings, drivers=()), 'a worker', every_seconds=0.05);"
        "time.sleep(60)"
    )
    stage.start("announcer", [sys.executable, "-c", program])

    def lives() -> bool:
        with database.transaction(stage.bind) as session:
            (shown,) = devices.page(session)
        return shown.live and shown.worker == "a worker"

    for _ in range(2):
        wait_for("an announcement", lives)
        with database.transaction(stage.bind) as session:
            session.execute(long_ago)


def test_runs_go_side_by_side_while_their_caps_fit(stage: Stage) -> None:
    """Three of 3/8 of the device: two at once, and the third when one of them has ended. Fails without `Slot.note`."""
    jobs = [stage.create_job(steps=LONG, memory_cap_bytes=3 * CAP_BYTES) for _ in range(3)]
    first, second = stage.supervisor(jobs[2]), stage.supervisor(jobs[2])  # whatever the message says
    for job_id in jobs[:2]:
        stage.reach(job_id, 1)
    with device_slot(stage.settings.data_dir, stage.device, slots=4, wait_seconds=0) as slot:
        assert slot is not None
        assert slot.others() == {(job_id, 1): 3 * CAP_BYTES for job_id in jobs[:2]}
    third = stage.supervisor(jobs[2])
    assert third.wait(10) == 0
    assert stage.job(jobs[2]).status == "queued"
    assert stage.events(jobs[2], "started") == []
    stage.redis.flushall()
    stage.request(jobs[0], "cancel")
    stage.end(jobs[0], "cancelled")
    wait_for("the end of a supervisor", lambda: first.poll() == 0 or second.poll() == 0)
    assert stage.waiting_messages() == 1  # whoever ends has the next one looked for
    stage.supervisor(jobs[2])
    stage.reach(jobs[2], 1)


def test_a_trainer_that_outlives_its_attempt_keeps_its_bytes(stage: Stage) -> None:
    """Its row is queued again and could run, were it not for what the old trainer still holds."""
    cap = 5 * CAP_BYTES
    job_id = stage.create_job(steps=3, memory_cap_bytes=cap)
    with device_slot(stage.settings.data_dir, stage.device, slots=4, wait_seconds=0) as orphan:
        assert orphan is not None
        orphan.note(job_id, 0, cap)
        assert stage.run(job_id).status == "queued"
    assert stage.run(job_id).status == "succeeded"
