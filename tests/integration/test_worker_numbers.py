"""What a worker says of itself: a real one, its pool and its trainers, asked over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import queue
from tests.integration.stage import CAP_BYTES, DEVICE_BYTES, Stage, open_stage, wait_for
from tests.integration.test_api_numbers import samples

STEPS = 40
HELD_BYTES = 30 << 20


@pytest.fixture
def stage(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(database_url, redis_url, tmp_path, worker_slots=1) as stage:
        yield stage


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, token: str | None = None, path: str = "/metrics") -> tuple[int, str]:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)  # it is http
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""
    except urllib.error.URLError:
        return 0, ""


def test_a_worker_says_what_its_trainers_hold_and_have_done(stage: Stage) -> None:
    port = free_port()
    stage.overrides = {"SLIMTUNE_WORKER_METRICS_ADDRESS": f"127.0.0.1:{port}", "SLIMTUNE_METRICS_TOKEN": "token"}
    job_id = stage.create_job(steps=STEPS)
    worker = stage.worker(hold_bytes=HELD_BYTES, hold_in="child", hold_seconds=600, hold_attempts=1)
    queue.wake(job_id, queue.producer(stage.settings.redis_url))

    def numbers() -> dict[str, float]:
        return samples(ask(port, "token")[1])

    def holding() -> dict[str, float] | None:
        found = numbers()
        return found if found.get("slimtune_worker_trainer_private_bytes[slot=0]", 0) > HELD_BYTES else None

    found = wait_for("a trainer with what it holds", holding, seconds=30)
    assert found["slimtune_worker_trainers[]"] == 1
    assert found["slimtune_worker_reserved_bytes[]"] == found["slimtune_worker_trainer_cap_bytes[slot=0]"] == CAP_BYTES
    assert found["slimtune_worker_device_memory_bytes[]"] == DEVICE_BYTES
    assert found["slimtune_worker_slots[]"] == stage.settings.worker_slots
    assert found["process_resident_memory_bytes[]"] > 0
    assert [ask(port, token)[0] for token in (None, "other")] == [401, 401]
    assert ask(port, "token", "/other")[0] == 404

    # The pool process dies with its trainer, and another attempt trains to the end.
    os.kill(int(str(stage.job(job_id).worker).rpartition(":")[2]), signal.SIGKILL)
    wait_for("the trainer's end", lambda: numbers()["slimtune_worker_trainers[]"] == 0)
    stage.sweeper()
    with stage.bind.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET lease_until = now() - interval '1 second' WHERE status = 'running'")
    stage.end(job_id, "succeeded", seconds=30)

    def counted() -> dict[str, float] | None:
        found = numbers()
        return found if "slimtune_worker_attempts_total[end=succeeded]" in found else None

    found = wait_for("the end, counted", counted)
    assert found["slimtune_worker_step_seconds_count[]"] == STEPS
    assert found["slimtune_worker_tokens_total[]"] == 64 * STEPS
    assert found["slimtune_worker_checkpoint_seconds_bucket[le=0.5]"] == len(range(5, STEPS, 5)) + 1
    assert (
        found["slimtune_worker_peak_over_predicted_count[]"]
        == found["slimtune_worker_time_over_predicted_count[]"]
        == 1
    )
    assert found["slimtune_worker_heartbeat_failures_total[]"] == 0
    worker.terminate()
    assert worker.wait(20) == 0
