"""The loss curve as files: what is in them, also of a job that goes over steps again."""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, delete
from starlette.testclient import TestClient

from service import artifacts, runs
from service.database import transaction
from service.models import Job, Metric
from service.tensorboard_events import crc32c, masked
from tests.integration.seed import claim, metric


def rows_of(client: TestClient, job: Job) -> list[dict[str, str]]:
    answer = client.get(f"/jobs/{job.id}/artifacts/metrics.csv")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/csv; charset=utf-8")
    assert answer.headers["content-disposition"] == 'attachment; filename="metrics.csv"'
    return list(csv.DictReader(io.StringIO(answer.text)))


def records(data: bytes) -> Iterator[bytes]:
    """The events of a file, their checksums verified."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        checksums = struct.unpack("<I", data[8:12])[0], struct.unpack("<I", rest[:4])[0]
        assert checksums == (masked(crc32c(data[:8])), masked(crc32c(body)))
        yield body
        data = rest[4:]


def test_what_there_is_of_a_running_job_and_of_one_that_goes_over_steps_again(
    client: TestClient, bind: Engine, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "PAGE_ROWS", 2)
    assert rows_of(client, job) == []
    first = claim(bind, job.id, lease_seconds=0.0)
    with transaction(bind) as session:
        runs.record_evaluation(session, job.id, 1, 0, 6.0)
        runs.record_metrics(session, job.id, 1, [metric(step) for step in range(1, 6)])
    assert [row["step"] for row in rows_of(client, job)] == list("012345")
    with transaction(bind) as session:
        assert runs.requeue_expired(session) == [job.id]
    claim(bind, job.id)
    with transaction(bind) as session:
        runs.record_metrics(session, job.id, first.attempt + 1, [metric(3, loss=None)])
    # Steps 4 and 5 are not trained on yet: the attempt that had them was lost.
    rows = rows_of(client, job)
    assert [(row["step"], row["attempt"], row["loss"]) for row in rows] == [
        ("0", "1", ""), ("1", "1", "4.9"), ("2", "1", "4.8"), ("3", "2", ""),
    ]  # fmt: skip
    assert rows[0]["validation_loss"] == "6.0"
    assert rows[3]["created_at"].endswith("Z")

    listed = client.get(f"/jobs/{job.id}/artifacts").json()["data"]
    assert [(entry["steps"], entry["complete"]) for entry in listed] == [(3, False)] * 2
    name = listed[1]["name"]
    assert name == f"events.out.tfevents.{int(job.created_at.timestamp())}.slimtune"
    events = list(records(client.get(f"/jobs/{job.id}/artifacts/{name}").content))
    assert [b"loss\x15" in event for event in events] == [False, False, True, True, True, False]
    assert [b"validation_loss" in event for event in events] == [False, False, True, False, False, False]
    # 128 tokens in 0.25 seconds, each step; also where rows have been thinned out.
    rate = b"tokens_per_second\x15" + struct.pack("<f", 512.0)
    assert [rate in event for event in events] == [False, False, False, True, True, True]
    assert b"memory_cap_bytes" in events[1]
    with transaction(bind) as session:
        session.execute(delete(Metric).where(Metric.step.in_((1, 2))))
    assert rate in list(records(client.get(f"/jobs/{job.id}/artifacts/{name}").content))[-1]
    with transaction(bind) as session:
        runs.finish(session, job.id, 2, "failed", error={"code": "diverged"})
    assert client.get(f"/jobs/{job.id}/artifacts").json()["data"][0]["complete"]


def test_no_other_names(client: TestClient, job: Job) -> None:
    for name in ("other.csv", "events.out.tfevents.1.slimtune", "..%2Fmetrics.csv"):
        answer = client.get(f"/jobs/{job.id}/artifacts/{name}")
        assert (answer.status_code, answer.json()["code"]) in {(404, "file_not_found"), (404, "not_found")}
