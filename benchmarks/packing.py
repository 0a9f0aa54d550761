"""Packing by bytes: thousands of jobs on a virtual clock under the service's own policy, and three real jobs at once.

    python -m benchmarks.packing [--draw]

Writes docs/figures/packing.json and .png and fills in docs/packing.md. The simulation takes seconds and is the same
everywhere; the real run starts the service with its own servers and takes two to three minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib as mpl

from benchmarks.bench_measure import MIB, ROOT, machine, progress
from benchmarks.packing_simulation import (
    DEVICE_BYTES,
    GIB,
    HOUR,
    NEWCOMER_AT,
    Policy,
    Run,
    Simulation,
    a_week,
    fifo,
    held,
    jain,
    largest_sum_of_caps,
    out_of_order,
    without_reservation,
)
from benchmarks.page import Target, at_least, at_most, fill, table, targets_table
from cli.client import Client, Job
from cli.up import Options, Stack
from service import packing

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes

SEEDS = (1, 2, 3)
POLICIES: dict[str, Policy] = {
    "packing": packing.choose,
    "without reservation": without_reservation,
    "one queue for all": fifo,
}
BACKLOGGED = ("flood", "short", "long", "wide")
"""They want more than their share during all of `CONTENDED`."""
CONTENDED = (1 * HOUR, 36 * HOUR)
CAPS = (300 * MIB, 340 * MIB, 400 * MIB)
JOB = {"model": "performer-tiny", "sequence_length": 8_192, "steps": 24}
COLOURS = {
    "flood": "#94a3b8",
    "short": "#2563eb",
    "long": "#0d9488",
    "wide": "#d97706",
    "newcomer": "#7c3aed",
    "large": "#be123c",
}

Record = dict[str, Any]


def main() -> None:
    """Simulate, run, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="no real run: keep the one on record")
    keep = parser.parse_args().draw
    page, folder = ROOT / "docs" / "packing.md", ROOT / "docs" / "figures"
    path = folder / "packing.json"
    runs = {(name, seed): Simulation(policy).run(a_week(seed)) for name, policy in POLICIES.items() for seed in SEEDS}
    simulated = {name: [_summary(runs[name, seed]) for seed in SEEDS] for name in POLICIES}
    real = json.loads(path.read_text())["real"] if keep else _real_run()
    targets = _targets(simulated, real)
    record = {"targets": targets, "simulated": simulated, "real": real}
    path.write_text(json.dumps(record, indent=1) + "\n")
    blocks = {
        "targets": targets_table(targets),
        "policies": _policies_table(simulated),
        "real": _real_table(real),
    }
    page.write_text(fill(page.read_text(), blocks))
    _draw({name: runs[name, SEEDS[0]] for name in POLICIES}, folder / "packing.png")
    for target in targets:
        print(target)


def _summary(runs: Sequence[Run]) -> Record:
    large = [run.waited for run in runs if run.job.tenant == "large"]
    blocked = [run.blocked_seconds for run in runs if run.job.tenant == "large"]
    shares = held(runs, *CONTENDED)
    arrived = held(runs, NEWCOMER_AT, NEWCOMER_AT + 12 * HOUR)
    return {
        "jobs": len(runs),
        "largest_sum_of_caps_bytes": largest_sum_of_caps(runs),
        "out_of_order": out_of_order(runs),
        "average_charged_bytes": {tenant: round(shares.get(tenant, 0.0)) for tenant in BACKLOGGED},
        "jain": jain([shares.get(tenant, 0.0) for tenant in BACKLOGGED]),
        "newcomer_charged_bytes": round(arrived.get("newcomer", 0.0)),
        "used_share_of_memory": sum(held(runs, *CONTENDED, charged=False).values()) / DEVICE_BYTES,
        "large_wait_hours": {"median": statistics.median(large) / HOUR, "longest": max(large) / HOUR},
        "large_blocked_hours": max(blocked) / HOUR,
        "hours": max(run.ended_at for run in runs) / HOUR,
    }


def _targets(simulated: dict[str, list[Record]], real: Record) -> list[Target]:
    ours, passed = simulated["packing"], simulated["without reservation"]
    every = [summary for summaries in simulated.values() for summary in summaries]
    peaks = [job.measured_peak_bytes / job["memory_cap_bytes"] for job in real["together"]]
    starved = min(summary["large_blocked_hours"] for summary in passed)
    return [
        at_least("simulated jobs", sum(summary["jobs"] for summary in ours), "jobs", 5_000),
        at_most(
            "largest sum of caps over the device's memory",
            max(summary["largest_sum_of_caps_bytes"] for summary in every) / DEVICE_BYTES,
            "ratio",
            1.0,
        ),
        at_most("jobs started before an older one of their tenant", sum(s["out_of_order"] for s in every), "jobs", 0),
        at_least("Jain's index of four backlogged tenants", min(s["jain"] for s in ours), "index", 0.95),
        at_most(
            "longest wait of a large job from its turn on", max(s["large_blocked_hours"] for s in ours), "hours", 12
        ),
        at_least("the same without reservation: starved", starved, "hours", 48),
        at_least("memory in use under contention", min(s["used_share_of_memory"] for s in ours), "share", 0.8),
        at_least("real jobs running at once", real["at_once"], "jobs", 3),
        at_most("largest measured peak over its cap", max(peaks), "ratio", 1.0),
        at_most("losses that differ from those of the job alone", real["losses_that_differ"], "steps", 0),
        at_most("wall time at once over one after the other", real["wall_ratio"], "ratio", 1.1),
    ]


def _real_run() -> Record:
    """The same three jobs at once and one after the other, through the API, on a device that holds just them."""
    os.environ["SLIMTUNE_DEVICE_MEMORY_BYTES"] = str(sum(CAPS))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        source = home / "topics.txt"
        source.write_text("\n".join(topics.values()))
        with Stack(Options(home / "up", port=0), progress) as stack, Client(stack.url) as client:
            dataset = client.datasets.upload(source)["id"]
            requests: list[dict[str, Any]] = [
                {**JOB, "dataset": dataset, "memory_cap": cap, "name": f"{cap // MIB} MiB"} for cap in CAPS
            ]
            together = [job.wait() for job in [client.jobs.create(**request) for request in requests]]
            one_by_one = [client.jobs.create(**request).wait() for request in requests]
            differ = sum(
                first["loss"] != second["loss"]
                for a, b in zip(together, one_by_one, strict=True)
                for first, second in zip(a.metrics(), b.metrics(), strict=True)
            )
            rows = [_row(job) for job in together], [_row(job) for job in one_by_one]
    walls = [max(row["ended"] for row in part) - min(row["claimed"] for row in part) for part in rows]
    return {
        "machine": machine(),
        "device_bytes": sum(CAPS),
        "together": rows[0],
        "one_by_one": rows[1],
        "at_once": max(sum(a["claimed"] <= b["claimed"] < a["ended"] for a in rows[0]) for b in rows[0]),
        "losses_that_differ": differ,
        "wall_seconds": {"together": walls[0], "one_by_one": walls[1]},
        "wall_ratio": walls[0] / walls[1],
    }


def _row(job: Job) -> Record:
    """Times are seconds of the database's clock."""
    times = {event["type"]: _seconds(event["created_at"]) for event in job.events()}
    steps = [metric["step_seconds"] for metric in job.metrics()][1:]
    return {
        "memory_cap_bytes": job.memory_cap_bytes,
        "measured_peak_bytes": job.measured_peak_bytes,
        "claimed": times["started"],
        "ended": times["succeeded"],
        "step_seconds": statistics.median(seconds for seconds in steps if seconds is not None),
    }


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _policies_table(simulated: dict[str, list[Record]]) -> str:
    def of(summaries: list[Record], pick: Callable[[Record], float], form: str) -> str:
        values = [pick(summary) for summary in summaries]
        low, high = f"{min(values):{form}}", f"{max(values):{form}}"
        return low if low == high else f"{low} to {high}"

    rows = [
        [
            name,
            of(summaries, lambda s: s["jain"], ".2f"),
            of(summaries, lambda s: 100 * s["used_share_of_memory"], ".0f") + " %",
            of(summaries, lambda s: s["large_wait_hours"]["median"], ".1f") + " h",
            of(summaries, lambda s: s["large_wait_hours"]["longest"], ".1f") + " h",
            of(summaries, lambda s: s["newcomer_charged_bytes"] / GIB, ".1f") + " GiB",
        ]
        for name, summaries in simulated.items()
    ]
    head = ["policy", "Jain's index", "memory used", "wait of a large job, median", "longest", "newcomer's first 12 h"]
    return table(head, rows)


def _real_table(real: Record) -> str:
    rows = [
        [
            f"{a['memory_cap_bytes'] / MIB:.0f} MiB",
            f"{a['measured_peak_bytes'] / MIB:.0f} MiB",
            f"{b['measured_peak_bytes'] / MIB:.0f} MiB",
            f"{a['step_seconds'] * 1000:.0f} ms",
            f"{b['step_seconds'] * 1000:.0f} ms",
            f"{a['ended'] - a['claimed']:.1f} s",
            f"{b['ended'] - b['claimed']:.1f} s",
        ]
        for a, b in zip(real["together"], real["one_by_one"], strict=True)
    ]
    walls = real["wall_seconds"]
    rows.append(["all three", "", "", "", "", f"{walls['together']:.1f} s", f"{walls['one_by_one']:.1f} s"])
    head = ["cap", "peak at once", "alone", "step at once", "alone", "run at once", "one after the other"]
    return table(head, rows)


def _draw(runs: dict[str, list[Run]], path: Path) -> None:
    figure = plt.figure(figsize=(10, 7.4))
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 4), hspace=0.42, wspace=0.24)
    _draw_memory(figure.add_subplot(grid[0, :]), runs["packing"])
    _draw_shares(figure.add_subplot(grid[1, 0]), runs)
    _draw_waits(figure.add_subplot(grid[1, 1]), runs)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _draw_memory(axes: Axes, runs: list[Run]) -> None:
    """Who holds how much, over two days."""
    hours = [minute / 60 for minute in range(0, 48 * 60, 2)]
    layers = {tenant: [0.0] * len(hours) for tenant in COLOURS}
    for run in runs:
        layer, gib = layers[run.job.tenant], run.job.memory_cap_bytes / GIB
        for index in range(math.ceil(run.started_at / 120), min(math.ceil(run.ended_at / 120), len(hours))):
            layer[index] += gib
    axes.stackplot(
        hours, list(layers.values()), labels=list(layers), colors=[COLOURS[name] for name in layers], linewidth=0
    )
    axes.axhline(DEVICE_BYTES / GIB, color="#111827", linewidth=1.2)
    axes.text(0.3, DEVICE_BYTES / GIB + 1, "the device: 64 GiB", va="bottom", color="#111827")
    axes.set_xlim(0, 48)
    axes.set_ylim(0, 74)
    axes.set_xticks(range(0, 49, 6))
    axes.set_xlabel("hours")
    axes.set_ylabel("sum of caps, GiB")
    axes.legend(frameon=False, ncols=6, loc="lower right", bbox_to_anchor=(1, 1.0), columnspacing=1.2, handlelength=1)
    axes.set_title(f"{len(runs):,} jobs, two days of them", loc="left", fontweight="bold")


def _draw_shares(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """What each backlogged tenant got."""
    shown = {"packing": "packing", "one queue for all": "one queue for all"}
    for row, (name, label) in enumerate(shown.items()):
        shares = held(runs[name], *CONTENDED)
        whole, left = sum(shares.get(tenant, 0.0) for tenant in BACKLOGGED), 0.0
        for tenant in BACKLOGGED:
            share = shares.get(tenant, 0.0) / whole
            axes.barh(row, share, left=left, color=COLOURS[tenant], height=0.55)
            if share > 0.05:
                axes.text(left + share / 2, row, f"{tenant}\n{share:.0%}", ha="center", va="center", color="white")
            left += share
        axes.text(0, row - 0.36, label, ha="left", va="bottom")
    axes.set_ylim(1.4, -0.6)
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("What four backlogged tenants got", loc="left", fontweight="bold")


def _draw_waits(axes: Axes, runs: dict[str, list[Run]]) -> None:
    """How long the jobs that want most of the device waited."""
    styles = {
        "packing": ("o", "#be123c"),
        "without reservation": ("x", "#64748b"),
        "one queue for all": ("+", "#a8a29e"),
    }
    for name, (marker, colour) in styles.items():
        large = [run for run in runs[name] if run.job.tenant == "large"]
        hours = [run.job.arrived_at / HOUR for run in large]
        axes.semilogy(hours, [run.waited / HOUR for run in large], marker, color=colour, label=name)
    axes.set_ylim(0.2, 600)
    axes.set_yticks([1, 10, 100], ["1 h", "10 h", "100 h"])
    axes.set_xlabel("arrival, hours")
    axes.legend(frameon=False, loc="center", bbox_to_anchor=(0.5, 0.57), ncols=2, columnspacing=1.0, handlelength=1)
    axes.set_title("Wait of jobs of 48 to 64 GiB", loc="left", fontweight="bold")


if __name__ == "__main__":
    main()
