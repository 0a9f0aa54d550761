"""The service's numbers in Prometheus' text format (exposition format 0.0.4).

What the database knows is read when it is asked for, so any API process gives the same answer, also after restarts.
Requests are counted by each process for itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from service.telemetry import PlanErrors, RunningJob, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EXAMPLE = '# HELP slimtune_jobs Jobs by status.\n# TYPE slimtune_jobs gauge\nslimtune_jobs{status="queued"} 3.0\n'
BUCKETS_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class RequestNumbers:
    """Of one API process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "slimtune_http_requests", "Answers.", ("method", "route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "slimtune_http_request_seconds",
            "Time from a request's head to the last byte of its answer; streams are left out.",
            ("route",),
            buckets=BUCKETS_SECONDS,
            registry=self.registry,
        )

    def count(self, scope: Scope, status: int | None, seconds: float | None) -> None:
        """One request. `status` is None where its client went away first, `seconds` where its answer is a stream."""
        # The template of the path, which the router leaves there; paths are the clients' own, and without end.
        route = getattr(scope.get("route"), "path", None) or "none"
        self._requests.labels(scope["method"], route, "gone" if status is None else str(status)).inc()
        if seconds is not None:
            self._seconds.labels(route).observe(seconds)


def exposition(snapshot: Snapshot, requests: RequestNumbers) -> bytes:
    """The whole answer."""
    registry = CollectorRegistry()
    registry.register(_Fixed(_families(snapshot)))
    return generate_latest(registry) + generate_latest(requests.registry)


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _families(snapshot: Snapshot) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("slimtune_jobs", "Jobs by status.", labels=("status",))
    for status, count in snapshot.jobs.items():
        jobs.add_metric((status,), count)
    yield jobs
    failures = GaugeMetricFamily("slimtune_jobs_failed", "Failed jobs by the code of their error.", labels=("code",))
    for code, count in snapshot.failures.items():
        failures.add_metric((code,), count)
    yield failures
    numbers = {
        "slimtune_queue_oldest_seconds": (
            "The longest that a job has waited since it was last queued.",
            snapshot.oldest_queued_seconds,
        ),
        "slimtune_leases_overdue": (
            "Running jobs whose lease has run out and whom no sweeper has taken back.",
            snapshot.leases_overdue,
        ),
        "slimtune_webhook_deliveries_pending": ("Deliveries that wait.", snapshot.deliveries_pending),
    }
    for name, (meaning, value) in numbers.items():
        yield GaugeMetricFamily(name, meaning, value=value)
    preparations = GaugeMetricFamily(
        "slimtune_preparations_unfinished", "What workers have to prepare, by what it is.", labels=("kind",)
    )
    for kind, count in snapshot.preparations.items():
        preparations.add_metric((kind,), count)
    yield preparations
    given_back = CounterMetricFamily(
        "slimtune_attempts_given_back",
        "Attempts that ended before their job did, by why: lease_expired, ...",
        labels=("reason",),
    )
    for reason, count in {"lease_expired": 0, **snapshot.given_back}.items():
        given_back.add_metric((reason,), count)
    yield given_back
    yield from _devices(snapshot)
    yield from _running(snapshot.running)
    yield from _plan_errors(snapshot.plan_errors)


def _devices(snapshot: Snapshot) -> Iterator[Metric]:
    numbers = {
        "slimtune_device_memory_bytes": ("What the caps of the jobs there may add up to.", "memory_bytes"),
        "slimtune_device_bytes_in_use": ("The sum of the caps of the jobs that run there.", "bytes_in_use"),
        "slimtune_device_jobs_running": ("Jobs that run there.", "jobs_running"),
        "slimtune_device_live": ("Whether its worker was heard of in the last three minutes.", "live"),
    }
    for name, (meaning, field) in numbers.items():
        family = GaugeMetricFamily(name, meaning, labels=("device",))
        for device in snapshot.devices:
            family.add_metric((device.id,), float(getattr(device, field)))
        yield family


def _running(running: list[RunningJob]) -> Iterator[Metric]:
    numbers = {
        "slimtune_job_step_seconds": ("Median of its latest steps.", "step_seconds"),
        "slimtune_job_tokens_per_second": ("Tokens trained on.", "tokens_per_second"),
        "slimtune_job_peak_bytes": ("Largest memory of its trainer so far.", "peak_bytes"),
        "slimtune_job_memory_cap_bytes": ("What that may never exceed.", "memory_cap_bytes"),
        "slimtune_job_peak_over_predicted": ("Measured over planned peak.", "peak_over_predicted"),
        "slimtune_job_time_over_predicted": ("Measured over planned time of a step.", "time_over_predicted"),
    }
    for name, (meaning, field) in numbers.items():
        family = GaugeMetricFamily(name, f"{meaning} Of jobs that run now.", labels=("job_id", "device"))
        for job in running:
            if (value := getattr(job, field)) is not None:
                family.add_metric((job.id, job.device), float(value))
        yield family


def _plan_errors(errors: PlanErrors) -> Iterator[Metric]:
    yield GaugeMetricFamily("slimtune_recent_jobs", "Newest succeeded jobs, of which the next two are.", errors.jobs)
    numbers = {
        "slimtune_recent_peak_over_predicted": ("Measured over planned peak.", errors.peak),
        "slimtune_recent_time_over_predicted": ("Measured over planned time of a step.", errors.time),
    }
    for name, (meaning, values) in numbers.items():
        family = GaugeMetricFamily(name, meaning, labels=("quantile",))
        for share, value in values.items():
            family.add_metric((f"{share:g}",), value)
        yield family
