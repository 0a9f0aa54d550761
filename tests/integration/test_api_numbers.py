"""GET /metrics: what Prometheus reads."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, text

from api.app import create_app
from benchmarks.load_stage import explained
from service import database, runs, telemetry
from service.models import Job
from service.settings import Settings
from tests.integration.seed import add_job, claim, metric

LOCAL = "http://127.0.0.1"


def samples(answer: str) -> dict[str, float]:
    """By name and labels."""
    found = {}
    for family in text_string_to_metric_families(answer):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}[{labels}]"] = sample.value
    return found


def test_jobs_queue_attempts_and_runs_of_all_tenants(client: TestClient, bind: Engine, job: Job) -> None:
    other = add_job(bind, job.dataset_id, tenant="another")
    lost = add_job(bind, job.dataset_id)
    claimed = claim(bind, other.id)
    claim(bind, lost.id, lease_seconds=0.0)
    with database.transaction(bind) as session:
        runs.record_metrics(session, other.id, claimed.attempt, [metric(step) for step in (1, 2)])
        assert runs.requeue_expired(session) == [lost.id]
    found = samples(client.get("/metrics").text)
    assert (found["slimtune_jobs[status=queued]"], found["slimtune_jobs[status=running]"]) == (2, 1)
    assert found["slimtune_jobs[status=failed]"] == 0
    assert found["slimtune_attempts_given_back_total[reason=lease_expired]"] == 1
    assert 0 < found["slimtune_queue_oldest_seconds[]"] < 3_600
    assert found["slimtune_leases_overdue[]"] == 0
    assert found["slimtune_preparations_unfinished[kind=tokenization]"] == 1
    mine = f"[device=,job_id={other.id}]"
    assert found[f"slimtune_job_step_seconds{mine}"] == 0.25
    assert found[f"slimtune_job_tokens_per_second{mine}"] == 128 / 0.25
    assert found[f"slimtune_job_peak_bytes{mine}"] == 300_000_002
    assert found[f"slimtune_job_memory_cap_bytes{mine}"] == other.memory_cap_bytes
    assert found[f"slimtune_job_peak_over_predicted{mine}"] == 300_000_002 / other.predicted_peak_bytes
    assert not any(lost.id in name for name in found)


def test_requests_are_counted_by_their_route(client: TestClient, job: Job) -> None:
    for path in (f"/jobs/{job.id}/events", f"/jobs/job_{32 * '0'}/events", "/nothing", "/v1/nothing"):
        client.get(path)
    found = samples(client.get("/metrics").text)
    assert found["slimtune_http_requests_total[method=GET,route=/jobs/{job_id}/events,status=200]"] == 1
    assert found["slimtune_http_requests_total[method=GET,route=/jobs/{job_id}/events,status=404]"] == 1
    assert found["slimtune_http_requests_total[method=GET,route=none,status=404]"] == 2
    assert found["slimtune_http_request_seconds_count[route=/jobs/{job_id}/events]"] == 2


@pytest.mark.parametrize(
    ("authentication", "token", "sent", "status"),
    [
        ("none", None, None, 200),
        ("keys", None, None, 401),  # whoever asks may come through a proxy on this machine
        ("keys", "", "", 401),
        ("none", "numbers-token", None, 401),
        ("keys", "numbers-token", "other", 401),
        ("none", "numbers-token", "numbers-token", 200),
        ("keys", "numbers-token", "numbers-token", 200),
    ],
)
def test_the_numbers_are_the_operators(
    settings: Settings, authentication: str, token: str | None, sent: str | None, status: int
) -> None:
    changed = Settings.model_validate(
        {**settings.model_dump(), "metrics_token": token, "authentication": authentication}
    )
    headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}
    with TestClient(create_app(changed), base_url=LOCAL) as client:
        answer = client.get("/metrics", headers=headers)
        assert (answer.status_code, "slimtune_jobs" in answer.text) == (status, status == 200)
        if token is None:
            assert client.get("/metrics", headers={"Host": "slimtune.example"}).status_code == 401
    assert "numbers-token" not in repr(changed)


def test_attempts_given_back_are_counted_by_their_own_index(bind: Engine, job: Job) -> None:
    claim(bind, job.id, lease_seconds=0.0)
    with database.transaction(bind) as session:
        runs.requeue_expired(session)
        others = "SELECT :job, 1, 'evaluation', '{}' FROM generate_series(1, 5000)"
        session.execute(text(f"INSERT INTO job_events (job_id, attempt, type, data) {others}"), {"job": job.id})
        session.execute(text("ANALYZE job_events"))
        plan = explained(session, lambda session: session.execute(telemetry.given_back()).all())
    assert "job_events_given_back" in str(plan)


def test_a_job_that_was_requeued_has_waited_since_then(client: TestClient, bind: Engine, job: Job) -> None:
    claim(bind, job.id, lease_seconds=0.0)
    with database.transaction(bind) as session:
        session.execute(text("UPDATE jobs SET created_at = now() - interval '9 days'"))
        session.execute(text("UPDATE job_events SET created_at = now() - interval '9 days'"))
    assert samples(client.get("/metrics").text)["slimtune_leases_overdue[]"] == 1
    with database.transaction(bind) as session:
        runs.requeue_expired(session)
    found = samples(client.get("/metrics").text)
    assert (found["slimtune_leases_overdue[]"], found["slimtune_jobs[status=queued]"]) == (0, 1)
    assert 0 < found["slimtune_queue_oldest_seconds[]"] < 3_600


def test_the_count_of_attempts_given_back_outlives_their_jobs(bind: Engine, job: Job) -> None:
    with database.transaction(bind) as session:
        others = "SELECT :job, 1, 'requeued', '{\"reason\": \"worker_shutdown\"}' FROM generate_series(1, 3)"
        session.execute(text(f"INSERT INTO job_events (job_id, attempt, type, data) {others}"), {"job": job.id})
        session.execute(text("INSERT INTO deleted_given_back (reason, count) VALUES ('worker_shutdown', 4)"))
    claim(bind, job.id, lease_seconds=0.0)
    with database.transaction(bind) as session:
        runs.requeue_expired(session)
    counts = {"worker_shutdown": 7, "lease_expired": 1}
    with database.transaction(bind) as session:
        assert dict(session.execute(telemetry.given_back()).all()) == counts
        session.execute(text("DELETE FROM jobs"))
        assert dict(session.execute(telemetry.given_back()).all()) == counts
        assert session.scalars(text("SELECT count(*) FROM job_events")).one() == 0


def test_plans_are_judged_by_jobs_that_succeeded(client: TestClient, bind: Engine, job: Job) -> None:
    found = samples(client.get("/metrics").text)
    assert found["slimtune_recent_jobs[]"] == 0
    assert not any(name.startswith("slimtune_recent_peak") for name in found)
    with database.transaction(bind) as session:
        for number in range(10):
            made = add_job(bind, job.dataset_id)
            claimed = claim(bind, made.id)
            peak = made.predicted_peak_bytes * (100 + number) // 100
            runs.record_metrics(session, made.id, claimed.attempt, [metric(1, peak_bytes=peak)])
            session.execute(
                text("UPDATE jobs SET status = 'succeeded', lease_until = NULL WHERE id = :id"), {"id": made.id}
            )
    found = samples(client.get("/metrics").text)
    assert found["slimtune_recent_jobs[]"] == 10
    peaks = [found[f"slimtune_recent_peak_over_predicted[quantile={share}]"] for share in ("0.5", "0.9", "1")]
    assert peaks == pytest.approx([1.04, 1.08, 1.09])
    assert found["slimtune_recent_time_over_predicted[quantile=0.5]"] == 0.5
