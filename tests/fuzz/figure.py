"""The picture of `make fuzz`: how each kind of attack was answered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

_INK = "#111827"
_CLASSES = {
    "refused, 4xx": ("4", "#2563eb"),
    "accepted, 2xx: the mutation did no harm": ("2", "#93c5fd"),
    "no answer: no HTTP, or broken off": ("N", "#cbd5e1"),
    "failed, 5xx": ("5", "#b91c1c"),
}
"""By the first letter of the status."""


def draw(record: dict[str, Any], path: Path) -> None:
    """A bar for each kind of attack, the most frequent first; encodings are one kind here."""
    import matplotlib as mpl  # noqa: PLC0415  # a test that draws nothing needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    kinds = _kinds(record["hostile"]["kinds"])
    names = sorted(kinds, key=lambda name: kinds[name].total())
    figure, axes = plt.subplots(figsize=(10.0, 1.6 + 0.3 * len(names)))
    ends = dict.fromkeys(names, 0)
    for label, (first, colour) in _CLASSES.items():
        counts = [kinds[name][first] for name in names]
        axes.barh(names, counts, left=list(ends.values()), color=colour, label=f"{label}: {sum(counts):,}", height=0.7)
        ends = {name: ends[name] + count for name, count in zip(names, counts, strict=True)}
    hostile = record["hostile"]
    title = f"{hostile['requests']:,} hostile requests, {len(hostile['violations'])} violations"
    axes.set_title(title, loc="left", color=_INK, weight="bold")
    axes.set_xlabel("requests")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _kinds(counted: dict[str, dict[str, int]]) -> dict[str, Counter[str]]:
    """Answers by the first letter of their status."""
    kinds: dict[str, Counter[str]] = {}
    for name, statuses in counted.items():
        family = "json: another encoding" if name.startswith("json: encoding") else name
        for status, count in statuses.items():
            kinds.setdefault(family, Counter())[status[0]] += count
    return kinds
