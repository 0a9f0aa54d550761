"""The picture of `make demo-smollm2`: what a step of each method takes, and what the job learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MIB = 2**20
_OWN, _OTHER, _PEER, _INK = "#2563eb", "#93b4f5", "#c9ccd3", "#111827"


def draw(record: dict[str, Any], path: Path) -> None:
    """Memory to the right and time upwards for each method, with the cap; losses over the job's steps."""
    import matplotlib as mpl  # noqa: PLC0415  # a test that draws nothing needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (steps, losses) = plt.subplots(1, 2, figsize=(11.5, 4.4), width_ratios=(3, 2))
    _steps(steps, record)
    _losses(losses, record["job"])
    for axes in (steps, losses):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _steps(axes: Any, record: dict[str, Any]) -> None:
    cap = record["job"]["cap_bytes"] / MIB
    names = list(record["steps"])
    peaks = [record["steps"][name]["peak_bytes"] / MIB for name in names]
    colours = [
        _OWN if number == 0 else _OTHER if name.startswith("slimtune") else _PEER for number, name in enumerate(names)
    ]
    places = range(len(names), 0, -1)
    axes.barh(places, peaks, color=colours, height=0.62)
    axes.axvline(cap, color=_INK, linewidth=1.2)
    axes.text(cap, len(names) + 0.55, f" cap: {cap:,.0f} MiB", va="bottom", fontsize=9)
    for place, name, peak in zip(places, names, peaks, strict=True):
        seconds = record["steps"][name]["step_seconds"]
        axes.text(peak, place, f" {peak:,.0f} MiB, {seconds:.1f} s", va="center", fontsize=9)
    axes.set_yticks(list(places), names, fontsize=9)
    axes.set_xlim(0, max(peaks) * 1.45)
    axes.set_xlabel("peak memory of the process, MiB; seconds a step")
    length = record["sequence_length"]
    axes.set_title(f"One step of LoRA on SmolLM2-135M, {length:,} tokens", loc="left", fontsize=10, pad=22)


def _losses(axes: Any, job: dict[str, Any]) -> None:
    axes.plot(*zip(*job["losses"], strict=True), color=_OTHER, linewidth=1.2, label="training")
    axes.plot(*zip(*job["validation"], strict=True), "o-", color=_OWN, label="held-out")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 0.99), ncols=2, borderaxespad=0.0)
    axes.set_title("What the job learnt", loc="left", fontsize=10, pad=22)
