"""The figure of docs/load.md."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

from benchmarks.bench_measure import Record
from benchmarks.load_report import BAR_P99_MILLISECONDS, step_ratio

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes

COLOURS = {
    "GET /jobs/{id}": "#2563eb",
    "GET /jobs/{id}/metrics": "#0d9488",
    "GET /jobs/{id}/events": "#7c3aed",
    "GET /jobs": "#d97706",
    "GET /healthz": "#94a3b8",
    "POST /plans": "#be123c",
}
SHADE = "#f1f5f9"
INK = "#111827"
QUIET = "#64748b"
LOADED = "#be123c"


def draw(record: Record, path: Path) -> None:
    """Every request and every step over time, and the share of requests that took longer than so long."""
    figure = plt.figure(figsize=(10.5, 6.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(5, 3), height_ratios=(3, 2), hspace=0.16, wspace=0.24)
    requests = figure.add_subplot(grid[0, 0])
    steps = figure.add_subplot(grid[1, 0], sharex=requests)
    _draw_requests(requests, record)
    _draw_steps(steps, record)
    _draw_tails(figure.add_subplot(grid[:, 1]), record)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _shade(axes: Axes, during: Record) -> None:
    axes.axvspan(during["began"], during["ended"], color=SHADE, linewidth=0, zorder=0)


def _draw_requests(axes: Axes, record: Record) -> None:
    during = record["phases"][1]
    _shade(axes, during)
    for kind, colour in COLOURS.items():
        points = [(during["began"] + due, took) for name, due, took, _ in during["requests"] if name == kind]
        if points:
            axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=2, alpha=0.6)
    axes.axhline(BAR_P99_MILLISECONDS, color=INK, linewidth=1)
    axes.text(0, BAR_P99_MILLISECONDS * 1.08, f"{BAR_P99_MILLISECONDS:.0f} ms", color=INK, va="bottom")
    axes.set_yscale("log")
    axes.set_ylabel("latency, ms")
    axes.tick_params(labelbottom=False)
    size = record["size"]
    axes.set_title(f"{size['rate']} requests a second, {size['jobs']:,} jobs", loc="left", fontweight="bold")


def _draw_steps(axes: Axes, record: Record) -> None:
    """Each step of the job that trains, when it was written, and the median of its phase."""
    during, last = record["phases"][1:]
    _shade(axes, during)
    steps = [(at, 1_000 * seconds) for at, seconds in record["steps"] if 0 <= at <= last["ended"]]
    axes.plot(*zip(*steps, strict=True), ".", color=QUIET, markersize=3, alpha=0.5)
    for phase in record["phases"]:
        median = 1_000 * statistics.median(phase["step_seconds"])
        colour = LOADED if phase is during else INK
        axes.hlines(median, phase["began"], phase["ended"], color=colour, linewidth=1.8)
        axes.annotate(f"{median:.0f}", (phase["ended"], median), (-2, 3), textcoords="offset points", ha="right")
    axes.set_ylim(
        0,
        1.25 * max(milliseconds for _, milliseconds in sorted(steps, key=lambda s: s[1])[: -len(steps) // 100 or None]),
    )
    axes.set_xlabel("seconds (shaded: with load)")
    axes.set_ylabel("training step, ms")
    axes.text(during["began"] + 1, 0, f"x {step_ratio(record):.2f}", color=LOADED, va="bottom", fontweight="bold")


def _draw_tails(axes: Axes, record: Record) -> None:
    for kind, colour in COLOURS.items():
        values = sorted(took for name, _, took, _ in record["phases"][1]["requests"] if name == kind)
        shares = [100 * (1 - index / len(values)) for index in range(len(values))]
        axes.plot(values, shares, color=colour, linewidth=1.6, label=f"{kind} ({len(values):,})")
    axes.axvline(BAR_P99_MILLISECONDS, color=INK, linewidth=1)
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_yticks([100, 10, 1, 0.1], ["100 %", "10 %", "1 %", "0.1 %"])
    axes.set_xlabel("took this many ms or longer")
    axes.set_title("Share of requests", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="lower left", fontsize=8, handlelength=1)
