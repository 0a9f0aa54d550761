"""The picture of `make chaos`: for each fault, how long its jobs stood still."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

_INK, _DOT, _MEDIAN, _BAD = "#111827", "#2563eb", "#ea580c", "#b91c1c"


def draw(faults: dict[str, dict[str, Any]], path: Path) -> None:
    """A row for each fault that interrupts, a dot for each time that it was inflicted."""
    import matplotlib as mpl  # noqa: PLC0415  # a test that draws nothing needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [(name, record) for name, record in faults.items() if record["recovery_seconds"]]
    figure, axes = plt.subplots(figsize=(10.0, 1.2 + 0.62 * max(1, len(rows))))
    for place, (name, record) in enumerate(reversed(rows)):
        seconds = sorted(max(value, 0.01) for value in record["recovery_seconds"])
        # Spread by rank, so that hundreds of dots on one line can be told apart.
        heights = [place + 0.26 * ((7 * rank) % 11 / 10 - 0.5) for rank in range(len(seconds))]
        axes.scatter(seconds, heights, s=13, color=_DOT, alpha=0.45, linewidths=0, zorder=3)
        median = statistics.median(seconds)
        axes.plot([median, median], [place - 0.27, place + 0.27], color=_MEDIAN, linewidth=2.2, zorder=4)
        label = f"{record['cycles']:,} {record['unit']}, median {median:.1f} s, longest {seconds[-1]:.1f} s"
        axes.text(0.008, place + 0.36, f"{name}: {label}", fontsize=9, color=_INK, va="center")
        if record["violations"]:
            axes.text(1.0, place, f"{len(record['violations'])} violations ", color=_BAD, ha="right", va="center",
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xscale="log", xlim=(0.007, 100), ylim=(-0.5, len(rows) - 0.3), yticks=[])
    axes.set_xticks([0.01, 0.1, 1, 10, 100], ["10 ms", "0.1 s", "1 s", "10 s", "100 s"])
    axes.set_xlabel("from the fault until the job went on (leases as short as the test's, not those of a service)")
    axes.grid(axis="x", color="#e5e7eb", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
