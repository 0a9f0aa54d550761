"""`make load` with less of everything, and how the database finds a page of a long curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from benchmarks import load, load_figure
from benchmarks.bench_measure import ROOT
from benchmarks.load_report import PAGE_INDEX, PAGE_ROWS, blocks, targets
from benchmarks.load_stage import CURVE, explained, nodes
from benchmarks.page import fill
from service import database, metrics
from service.models import Job

ROWS = 50_000


@pytest.mark.slow
@pytest.mark.timeout(900)  # on a busy machine the worker's measuring alone takes a minute
def test_the_service_answers_everybody_while_a_job_trains(tmp_path: Path, calibrated: Callable[[Path], None]) -> None:
    size = load.SHORT
    record = load.measured(size, calibrated)
    _, during, _ = record["phases"]
    assert len(during["requests"]) == size.rate * size.load_seconds
    assert {status for *_, status in during["requests"]} == {200}
    assert {kind for kind, *_ in during["requests"]} == set(load.SHARES)
    assert all(phase["step_seconds"] for phase in record["phases"])
    assert during["cores"]["API"] > 0
    assert during["cores"]["trainer"] > 0
    assert {name: len(values) for name, values in record["pages"]["milliseconds"].items()} == {
        "HTTP 1000": size.pages,
        "HTTP 10000": size.pages,
        "service 1000": size.pages,
        "service 10000": size.pages,
    }
    record["targets"] = targets(record)
    timed = {target["name"] for target in record["targets"] if target["unit"] in {"ms", "ratio"}}
    assert [t["name"] for t in record["targets"] if not t["met"] and t["name"] not in timed] == [], record
    page = (ROOT / "docs" / "load.md").read_text()
    assert "GET /jobs/{id}/events" in fill(page, blocks(record))
    load_figure.draw(record, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


def test_a_page_of_metrics_is_found_by_the_primary_key(bind: Engine, job: Job) -> None:
    """Of a table that the planner knows, so that it is not by lack of knowledge."""
    with database.transaction(bind) as session:
        session.connection().exec_driver_sql(CURVE, ([job.id], ROWS))
    with bind.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE metrics"))
    with database.transaction(bind) as session:
        plan = explained(session, lambda session: metrics.page(session, job.id, ROWS // 2, PAGE_ROWS))
    scans = [node for node in nodes(plan) if "Scan" in node["Node Type"]]
    assert [(node["Node Type"], node["Index Name"]) for node in scans] == [("Index Scan", PAGE_INDEX)]
    assert scans[0]["Actual Rows"] == PAGE_ROWS + 1  # no more than it needs to know whether there are more
    assert all(node["Node Type"] != "Sort" for node in nodes(plan))
