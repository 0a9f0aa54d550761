"""Devices over HTTP, and caps that none of them can hold."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine
from starlette.testclient import TestClient

from service import claims, devices
from service.database import transaction
from service.devices import Announcement
from service.storage import Storage
from tests.integration.seed import LEASE_SECONDS, add_dataset, add_job

GIB = 1 << 30
PLAN = {"model": "performer-tiny", "sequence_length": 1_024, "steps": 2}


@pytest.fixture
def device(bind: Engine) -> None:
    with transaction(bind) as session:
        devices.announce(session, Announcement("cpu-here", "cpu", 2 * GIB, 4), "celery@here")


def test_devices_are_listed(client: TestClient, bind: Engine, storage: Storage, device: None) -> None:
    add_job(bind, add_dataset(bind, storage).id, memory_cap_bytes=GIB)
    with transaction(bind) as session:
        assert claims.next_job(session, "cpu-here", "w", lease_seconds=LEASE_SECONDS) is not None
    answer = client.get("/devices").json()
    assert answer["has_more"] is False
    (shown,) = answer["data"]
    assert shown.pop("updated_at")
    assert shown == {
        "id": "cpu-here",
        "kind": "cpu",
        "memory_bytes": 2 * GIB,
        "bytes_in_use": GIB,
        "slots": 4,
        "jobs_running": 1,
        "worker": "celery@here",
        "live": True,
    }


def refused(answer: Any) -> None:
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "memory_cap_exceeds_device")
    assert problem["largest_device_bytes"] == 2 * GIB
    assert problem["error"]["param"] == "memory_cap"


def test_a_cap_that_no_device_can_hold_is_refused(
    client: TestClient, bind: Engine, storage: Storage, device: None
) -> None:
    dataset = add_dataset(bind, storage, "Hello, world. " * 1_000).id
    refused(client.post("/plans", json={**PLAN, "memory_cap": 2 * GIB + 1}))
    refused(client.post("/jobs", json={**PLAN, "dataset": dataset, "memory_cap": "3GiB"}))
    job = client.post("/jobs", json={**PLAN, "dataset": dataset, "memory_cap": "2GiB"})
    assert job.status_code == 202
    job_id = job.json()["id"]
    assert client.post(f"/jobs/{job_id}/pause").json()["status"] == "paused"
    refused(client.post(f"/jobs/{job_id}/resume", json={"memory_cap": "3GiB"}))
    assert client.get(f"/jobs/{job_id}").json()["status"] == "paused"
    with transaction(bind) as session:  # the machine has less now than when the job was made
        devices.announce(session, Announcement("cpu-here", "cpu", GIB, 4), "celery@here")
    answer = client.post(f"/jobs/{job_id}/resume")
    assert (answer.status_code, answer.json()["code"]) == (422, "memory_cap_exceeds_device")
    assert client.post(f"/jobs/{job_id}/resume", json={"memory_cap": "1GiB"}).json()["status"] == "queued"


def test_any_cap_is_planned_while_no_device_has_announced_itself(client: TestClient) -> None:
    assert client.get("/devices").json() == {"data": [], "has_more": False}
    assert client.post("/plans", json={**PLAN, "memory_cap": "1TiB"}).status_code == 200
