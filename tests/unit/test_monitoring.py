"""docs/monitoring.md, the dashboard and the alerts name what is really served, and the page names all of it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.prometheus import RequestNumbers, exposition
from service.devices import Announcement, DeviceState
from service.telemetry import PlanErrors, RunningJob, Snapshot, quantiles
from worker import exposition as worker_exposition
from worker import numbers
from worker.exposition import MachineNumbers, RunningTrainer

DOCS = Path(__file__).resolve().parents[2] / "docs"
DASHBOARD: dict[str, Any] = json.loads((DOCS / "grafana" / "slimtune.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((DOCS / "grafana" / "alerts.yml").read_text())
PAGE = (DOCS / "monitoring.md").read_text()

WORDS = frozenset(
    ("absent", "and", "histogram_quantile", "increase", "max", "or", "rate", "sum", "time", "topk", "unless", "vector")
)
"""Of PromQL."""
TARGET_LABELS = {"instance"}
"""Of Prometheus itself. `job` is one too, and so no label of ours."""

SNAPSHOT = Snapshot(
    jobs={"queued": 1, "running": 1},
    failures={"diverged": 1},
    oldest_queued_seconds=1.0,
    leases_overdue=0,
    given_back={"worker_shutdown": 1},
    preparations={"model": 1},
    deliveries_pending=0,
    devices=[DeviceState("cpu-1", "cpu", 2, 1, 4, 1, "w", live=True, updated_at=datetime.now(UTC))],
    running=[RunningJob("job_1", "cpu-1", 1.0, 1.0, 1, 2, 1.0, 1.0)],
    plan_errors=PlanErrors(1, quantiles([1.0]), quantiles([1.0])),
)


def described(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of each metric that is served, by the name that a counter has in queries."""
    found = {}
    for family in text_string_to_metric_families(text):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.documentation, family.name
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if samples:
            found[name] = (family.type, frozenset(labels))
    return found


@pytest.fixture(scope="module")
def api() -> dict[str, tuple[str, frozenset[str]]]:
    requests = RequestNumbers()
    requests.count({"method": "GET"}, 200, 0.1)
    return described(exposition(SNAPSHOT, requests).decode())


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    monkeypatch.setattr(worker_exposition, "trainers", lambda *_: [RunningTrainer(0, 2, 1)])
    machine = MachineNumbers(Announcement("cpu-1", "cpu", 2, 4), tmp_path)
    machine.calibrated_at = 1.0
    registry = CollectorRegistry()
    registry.register(machine)
    ProcessCollector(registry=registry)
    numbers.ATTEMPTS.labels("succeeded")
    return described(generate_latest(registry).decode() + generate_latest(numbers.REGISTRY).decode())


def documented(heading: str) -> dict[str, tuple[str, frozenset[str]]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", section, re.MULTILINE)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_page_has_every_metric_with_its_type_and_labels(
    api: dict[str, tuple[str, frozenset[str]]], worker: dict[str, tuple[str, frozenset[str]]]
) -> None:
    assert documented("The service's numbers") == api
    ours = {name: kind for name, kind in worker.items() if not name.startswith("process_")}
    assert documented("A worker's numbers") == ours
    assert not {label for _, labels in (api | worker).values() for label in labels} & {"job", "instance"}


def expressions() -> list[tuple[str, str]]:
    """Where they stand, and they."""
    panels = DASHBOARD["panels"]
    found = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]
    found += [(rule["alert"], rule["expr"]) for group in ALERTS["groups"] for rule in group["rules"]]
    return found


def test_dashboard_and_alerts_ask_for_what_is_served(
    api: dict[str, tuple[str, frozenset[str]]], worker: dict[str, tuple[str, frozenset[str]]]
) -> None:
    served: dict[str, frozenset[str]] = {}
    for name, (kind, labels) in (api | worker).items():
        suffixes = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        served |= {name + suffix: labels | ({"le"} if suffix == "_bucket" else frozenset()) for suffix in suffixes}
    used = set()
    for where, expression in expressions():
        assert expression.count("(") == expression.count(")"), where
        selectors = re.findall(r"\b([a-z_]\w+)\{(.*?)\}", expression)
        for name, matchers in selectors:
            assert name in served, (where, name)
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= served[name], (where, name)
        bare = re.sub(r"\{.*?\}|\[.*?\]|\"[^\"]*\"", "", expression)
        groups = re.findall(r"\b(?:by|on|without) ?\(([^)]*)\)", bare)
        names = set(re.findall(r"[a-z_]\w+", re.sub(r"\b(?:by|on|without) ?\([^)]*\)", "", bare))) - WORDS
        assert names, where
        assert names <= set(served), (where, names - set(served))
        grouped = {label.strip() for group in groups for label in group.split(",")} - {""}
        assert grouped <= {label for name in names for label in served[name]} | TARGET_LABELS, where
        used |= names
    ours = {name.removesuffix("_bucket") for name in used}
    missing = {name for name in api | worker if name.startswith("slimtune_")} - ours
    # What the dashboard leaves out: parts of a ratio that it shows, and what the other process says better.
    assert missing == {"slimtune_device_jobs_running", "slimtune_job_peak_over_predicted",
                       "slimtune_worker_time_over_predicted", "slimtune_worker_trainer_cap_bytes"}  # fmt: skip


def test_the_dashboard_can_be_imported() -> None:
    panels = DASHBOARD["panels"]
    assert DASHBOARD["uid"] == "slimtune"
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels lie on one another"


def test_every_alert_is_documented_and_says_what_to_do() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    for rule in rules:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "action"}
        names = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
        assert all(f"({name})" in rule["expr"] for name in names), rule["alert"]
    assert {rule["alert"] for rule in rules} == set(re.findall(r"`(Slimtune\w+)`", PAGE))
