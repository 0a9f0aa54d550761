"""The figure of docs/api-speed.md."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib as mpl

from benchmarks.api_speed_report import BAR_GROWTH_BYTES, BAR_SERVER, BAR_SHARE, BARS, OURS, growth_bytes, rates, speed
from benchmarks.bench_measure import MIB, Record

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes

INK = "#111827"
QUIET = "#94a3b8"
PALE = "#cbd5e1"
OWN = "#2563eb"
OWN_PALE = "#93c5fd"
BAR = "#be123c"


def draw(record: Record, path: Path) -> None:
    """Requests a second, downloads beside static servers, memory over time."""
    figure = plt.figure(figsize=(10.5, 6.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(3, 2), width_ratios=(1, 1), hspace=0.5, wspace=0.42)
    _draw_requests(figure.add_subplot(grid[0, 0]), record)
    _draw_downloads(figure.add_subplot(grid[0, 1]), record)
    _draw_memory(figure.add_subplot(grid[1, :]), record)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _draw_requests(axes: Axes, record: Record) -> None:
    """A bar for the median, a point for every round, a line for what had to be reached."""
    before = (record.get("before") or {}).get("rounds", [])
    kinds = list(BARS)
    for place, kind in enumerate(kinds):
        for rounds, offset, colour in ((before, 0.2, PALE), (record["rounds"], -0.18, OWN)):
            values = rates(rounds, kind)
            if not values:
                continue
            median = statistics.median(values)
            axes.barh(place + offset, median, 0.34, color=colour)
            axes.plot(values, [place + offset] * len(values), ".", color=INK, markersize=4)
            axes.text(max(values) * 1.06, place + offset, f"{median:,.0f}", va="center", color=INK, fontsize=9)
        axes.plot([BARS[kind]] * 2, [place - 0.42, place + 0.42], color=BAR, linewidth=1.6)
    axes.set_xscale("log")
    axes.set_xlim(10, 6_000)
    axes.set_xticks([10, 100, 1_000], ["10", "100", "1,000"])
    axes.set_yticks(range(len(kinds)), [kind.replace(", ", ",\n") for kind in kinds])
    axes.invert_yaxis()
    axes.set_xlabel("requests a second (pale: before; red: the bar)")
    axes.set_title("One API process, two cores", loc="left", fontweight="bold")


def _draw_downloads(axes: Axes, record: Record) -> None:
    """Servers from the top, one and four clients beside each other."""
    found = record["downloads"]
    names = list(found)
    counts = list(found[OURS])
    for place, name in enumerate(names):
        for offset, clients in zip((-0.19, 0.19), counts, strict=False):
            dark, light = (OWN, OWN_PALE) if name == OURS else (QUIET, PALE)
            one = clients == counts[0]
            axes.barh(place + offset, speed(found, name, clients), 0.35, color=dark if one else light)
            speeds = found[name][clients]["speed"]
            axes.plot(speeds, [place + offset] * len(speeds), ".", color=INK, markersize=3)
            unit = f"{clients} client" + ("" if one else "s")
            axes.text(0.02, place + offset, unit, va="center", fontsize=8, color="white" if one else INK)
    for offset, clients in zip((-0.19, 0.19), counts, strict=False):
        bar = BAR_SHARE * speed(found, BAR_SERVER, clients)
        axes.plot([bar] * 2, [offset - 0.19, offset + 0.19], color=BAR, linewidth=1.8)
    axes.set_yticks(range(len(names)), [name.replace(", ", ",\n").replace(" -m ", " -m\n") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"GB a second (red: {BAR_SHARE:.0%} of {BAR_SERVER})")
    axes.set_title("Downloads of one file", loc="left", fontweight="bold")


def _draw_memory(axes: Axes, record: Record) -> None:
    memory = record["memory"]
    times = [at for at, _ in memory["resident"]]
    grown = [(resident - memory["before"]) / MIB for _, resident in memory["resident"]]
    axes.fill_between(times, grown, color=OWN, alpha=0.15, linewidth=0)
    axes.plot(times, grown, color=OWN, linewidth=1)
    axes.axhline(BAR_GROWTH_BYTES / MIB, color=BAR, linewidth=1.4)
    for end in memory["ends"]:
        axes.axvline(end, color=PALE, linewidth=1, linestyle=":")
    axes.set_ylim(min(0, *grown), 1.25 * max(BAR_GROWTH_BYTES, growth_bytes(memory)) / MIB)
    axes.set_xlim(0, times[-1])
    axes.set_xlabel(f"seconds, {memory['clients']} clients at once, {len(memory['ends'])} times the whole file")
    axes.set_ylabel("the API's growth, MiB")
    axes.set_title("Memory meanwhile", loc="left", fontweight="bold")
