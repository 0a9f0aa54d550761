"""The picture of `make caps`: a panel for each specification, caps to the right, measured peaks upwards."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

MIB = 2**20
_NOTHING_RUNS = "refused, nothing runs"
_REFUSED, _HELD, _OVER, _INK = "#fde8e8", "#2563eb", "#ea580c", "#111827"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """What was refused, what ran below its cap, and how plans that were wrong came back below it."""
    import matplotlib as mpl  # noqa: PLC0415  # a test that draws nothing needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(dict.fromkeys(run["specification"] for run in runs))
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.9 * lines), squeeze=False)
    for panel, name in zip(axes.flat, names, strict=False):
        _panel(panel, name, [run for run in runs if run["specification"] == name])
    for panel in axes.flat[len(names) :]:
        panel.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _panel(axes: Any, name: str, runs: list[dict[str, Any]]) -> None:
    minimum, unchunked = (runs[0][key] / MIB for key in ("minimum_bytes", "unchunked_bytes"))
    low, high = 0.88 * minimum, 1.12 * unchunked
    axes.fill_between([low, high], [low, high], high, color="#f3f4f6", linewidth=0)
    axes.axvspan(low, minimum, color=_REFUSED, linewidth=0)
    axes.plot([low, high], [low, high], color=_INK, linewidth=0.9)
    label = low + 0.62 * (high - low)
    axes.text(label, label + 0.03 * (high - low), "over the cap ", ha="right", fontsize=8, color="#6b7280")
    axes.axhline(unchunked, color="#9ca3af", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.text(minimum * 1.01, unchunked, "unchunked, as predicted", fontsize=8, color="#6b7280", va="bottom")
    for run in runs:
        cap = run["cap_bytes"] / MIB
        peaks = [peak / MIB for peak in run["peaks_bytes"] if peak]
        if not peaks:
            axes.plot([cap], [low], "x", color="#b91c1c", markersize=7, clip_on=False, zorder=4, label=_NOTHING_RUNS)
        for peak, after in pairwise(peaks):
            axes.annotate("", (cap, after), (cap, peak), arrowprops={"arrowstyle": "->", "color": _OVER})
        ended_well = run["status"] == "succeeded"
        for number, peak in enumerate(peaks):
            held = ended_well and number == len(peaks) - 1
            colour, meaning = (_HELD, "trained") if held else (_OVER, "ended over the cap, planned anew")
            axes.plot([cap], [peak], "o", color=colour, markersize=6, zorder=4, label=meaning)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), loc="lower right", fontsize=8, frameon=False)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="memory_cap, MiB", ylabel="measured peak, MiB")
    axes.set_title(name, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
