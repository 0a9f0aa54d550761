"""What had to be reached under load, and the tables of docs/load.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.bench_measure import Record
from benchmarks.page import Target, at_least, at_most, table, targets_table

PAGE_ROWS = 1_000
"""The API's default for metrics."""
PAGE_INDEX = "metrics_pkey"
SUBMISSIONS = 50
BAR_P99_MILLISECONDS = 100.0
BAR_STEP_RATIO = 1.3
BAR_PAGE_MILLISECONDS = 50.0


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    return sorted_values[max(math.ceil(share * len(sorted_values)), 1) - 1]


def targets(record: Record) -> list[Target]:
    """What was reached of what had to be."""
    _, during, _ = record["phases"]
    requests = during["requests"]
    latencies = sorted(milliseconds for *_, milliseconds, _ in requests)
    wrong = sum(status != 200 for *_, status in requests)
    pages = record["pages"]["milliseconds"][f"HTTP {PAGE_ROWS}"]
    by_index = any(node["Index Name"] == PAGE_INDEX for node in record["pages"]["plan"])
    submissions = record["submissions"]
    rows = f"{PAGE_ROWS:,} of {record['size']['long_steps']:,} metrics"
    return [
        at_most("requests: 99 % within", percentile(latencies, 0.99), "ms", BAR_P99_MILLISECONDS),
        at_most("requests: errors", wrong, f"of {len(requests)}", 0),
        at_most("training step with load over without", step_ratio(record), "ratio", BAR_STEP_RATIO),
        at_most(f"{rows}, median page", statistics.median(pages), "ms", BAR_PAGE_MILLISECONDS),
        at_most(f"{rows}, slowest page", max(pages), "ms", BAR_PAGE_MILLISECONDS),
        at_least(f"{rows}, read by {PAGE_INDEX}", by_index, "plan", 1),
        at_least("submissions at once: answered", submissions["answered"], "jobs", SUBMISSIONS),
        at_most("submissions at once: lost", submissions["lost"], "jobs", 0),
        at_most("submissions at once: doubled", submissions["doubled"], "jobs", 0),
        at_most("submissions at once: not ended when cancelled", submissions["not_ended"], "jobs", 0),
    ]


def step_ratio(record: Record) -> float:
    """The median step with load over the mean of the medians before and after."""
    before, during, after = (statistics.median(phase["step_seconds"]) for phase in record["phases"])
    return float(during / statistics.fmean((before, after)))


def blocks(record: Record) -> dict[str, str]:
    """What stands between the markers of the page."""
    return {
        "targets": targets_table(record["targets"]),
        "latencies": _latencies(record),
        "cores": _cores(record),
        "pages": _pages(record),
    }


def _latencies(record: Record) -> str:
    _, during, _ = record["phases"]
    by_kind: dict[str, list[float]] = {}
    for kind, _, milliseconds, _ in sorted(during["requests"], key=lambda request: request[2]):
        for name in (f"`{kind}`", "all"):
            by_kind.setdefault(name, []).append(milliseconds)
    rows = []
    for kind, values in sorted(by_kind.items(), key=lambda item: len(item[1]), reverse=True):
        shown = [f"{percentile(values, share):.1f}" for share in (0.5, 0.95, 0.99)]
        rows.append([kind, str(len(values)), *shown, f"{values[-1]:.1f}"])
    rate = len(during["requests"]) / during["answered_seconds"]
    return (
        table(["milliseconds", "requests", "median", "95 %", "99 %", "slowest"], rows)
        + f"\n\n{rate:.0f} requests a second were answered. The client itself was at most "
        + f"{during['client_late_milliseconds']:.1f} ms late."
    )


def _cores(record: Record) -> str:
    phases = record["phases"]
    rows = [[role, *(f"{phase['cores'].get(role, 0.0):.2f}" for phase in phases)] for role in phases[1]["cores"]]
    steps = [f"{1_000 * statistics.median(phase['step_seconds']):.0f} ms" for phase in phases]
    counts = [str(len(phase["step_seconds"])) for phase in phases]
    where = f"{record['machine']['cpu']}, {record['cores']} cores for everything, the client included"
    head = ["cores used", *(f"{phase['name']} the load" for phase in phases)]
    return (
        table(head, [*rows, ["median step", *steps], ["steps", *counts]])
        + f"\n\n{where}; {record['seconds'] / 60:.1f} minutes, load {record['load_before']} before."
    )


def _pages(record: Record) -> str:
    rows = [
        [name, str(len(values)), f"{statistics.median(values):.1f}", f"{max(values):.1f}"]
        for name, values in record["pages"]["milliseconds"].items()
    ]
    submissions = record["submissions"]
    return (
        table(["milliseconds, by way and rows", "pages", "median", "slowest"], rows)
        + f"\n\nIn the database such a page takes {record['pages']['execution_milliseconds']:.1f} ms. The slowest of "
        + f"{SUBMISSIONS} submissions at once took {submissions['slowest_seconds']:.2f} s."
    )
