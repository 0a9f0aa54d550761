"""Memory and time against the number of chunks, predicted and measured: the picture of how the planner thinks.

    make tradeoff        writes docs/figures/tradeoff.png and tradeoff.json

Every point runs in a process of its own with the trainer's environment (`benchmarks/probe.py`); rounds are
interleaved over the points and the medians shown, so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib as mpl

from benchmarks.bench_measure import MIB, ROOT, probe
from benchmarks.page import at_least, at_most
from slim_core.config import BUILTIN_MODELS, TrainConfig
from slim_core.data.prepare import make_tokens
from slim_core.planning import Calibration, Chunking, Plan, Workload, plan_job
from worker.calibrator import measure

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

FIGURES = ROOT / "docs" / "figures"
MODEL = "performer-tiny"
SEQUENCE_LENGTH = 8_192
CHUNK_LENGTHS = (8_192, 4_096, 2_048, 1_024, 512, 256, 128, 64, 32)
TRAIN = TrainConfig(sequence_length=SEQUENCE_LENGTH, batch_size=1, steps=5)
ROUNDS = 3
CAP_BYTES = 300 * MIB
"""The demonstration's."""


@dataclass(frozen=True)
class Point:
    """One chunk length: its plan, and what its process measured, a value a round."""

    plan: Plan
    peak_bytes: list[int]
    step_seconds: list[float]


def main() -> None:
    """Measure, draw, and write what was seen."""
    threads = os.cpu_count() or 1
    calibration = measure(threads)
    model = BUILTIN_MODELS[MODEL]
    workload = Workload(model, TRAIN)
    chosen = plan_job(workload, CAP_BYTES, calibration)
    lengths = sorted({*CHUNK_LENGTHS, chosen.chunk_length}, reverse=True)
    plans = [plan_job(workload, 1 << 50, calibration, Chunking(n, chosen.state_policy)) for n in lengths]
    points = [Point(plan, [], []) for plan in plans]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data.txt"
        source.write_text("\n".join(topics.values()))
        data = make_tokens(source)
        for _ in range(ROUNDS):
            for point in points:
                result = probe(workload, point.plan, data, threads)
                point.peak_bytes.append(result["peak_bytes"] + calibration.runtime_bytes - result["runtime_bytes"])
                point.step_seconds.append(result["step_seconds"])
                print(point.plan.chunk_length, result, flush=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    _draw(points, chosen)
    (FIGURES / "tradeoff.json").write_text(json.dumps(_record(points, chosen, calibration), indent=2) + "\n")


def _draw(points: list[Point], chosen: Plan) -> None:
    chunks = [point.plan.num_chunks for point in points]
    mine = next(point for point in points if point.plan.chunk_length == chosen.chunk_length)
    colours = {"memory": "#2563eb", "time": "#c2410c", "cap": "#111827"}
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.6, 6.2), sharex=True, height_ratios=(3, 2))
    above.plot(
        chunks, [p.plan.predicted_peak_bytes / MIB for p in points], "--", color=colours["memory"], label="predicted"
    )
    above.plot(
        chunks, [max(p.peak_bytes) / MIB for p in points], "o-", color=colours["memory"], label="measured, largest"
    )
    above.axhline(CAP_BYTES / MIB, color=colours["cap"], linewidth=1.2)
    above.axhspan(CAP_BYTES / MIB, above.get_ylim()[1], color=colours["cap"], alpha=0.07, linewidth=0)
    low, high = above.get_ylim()
    above.set_ylim(low - 0.03 * (high - low), high)
    above.text(chunks[-1], CAP_BYTES / MIB, f"cap: {CAP_BYTES // MIB} MiB ", ha="right", va="bottom")
    above.set_ylabel("peak memory of the trainer, MiB")
    above.annotate(
        f"the plan: {chosen.num_chunks} chunks of {chosen.chunk_length}",
        (mine.plan.num_chunks, max(mine.peak_bytes) / MIB),
        xytext=(0, 44),
        textcoords="offset points",
        ha="left",
        arrowprops={"arrowstyle": "->", "color": colours["cap"]},
    )
    above.legend(frameon=False, loc="upper right")
    below.plot(chunks, [p.plan.predicted_step_seconds for p in points], "--", color=colours["time"], label="predicted")
    below.plot(
        chunks,
        [statistics.median(p.step_seconds) for p in points],
        "o-",
        color=colours["time"],
        label="measured, median",
    )
    below.axvline(chosen.num_chunks, color=colours["cap"], linewidth=0.8, linestyle=":")
    below.set_ylabel("seconds per step")
    below.set_ylim(bottom=0)
    below.set_xlabel("number of chunks (logarithmic)")
    below.set_xscale("log", base=2)
    below.set_xticks(chunks, [str(n) for n in chunks])
    below.legend(frameon=False, loc="upper left")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{MODEL}, {SEQUENCE_LENGTH:,} tokens a sequence, {os.cpu_count()} CPU threads", y=0.98)
    figure.tight_layout()
    figure.savefig(FIGURES / "tradeoff.png", dpi=150)


def _record(points: list[Point], chosen: Plan, calibration: Calibration) -> dict[str, Any]:
    ratios = [max(point.peak_bytes) / point.plan.predicted_peak_bytes for point in points]
    full = next(point for point in points if point.plan.num_chunks == 1)
    mine = next(point for point in points if point.plan.chunk_length == chosen.chunk_length)
    slower = statistics.median(mine.step_seconds) / statistics.median(full.step_seconds)
    saved = max(full.peak_bytes) / max(mine.peak_bytes)
    return {
        "targets": [
            at_most("largest measured peak over predicted", max(ratios), "ratio", 1.0),
            at_least("smallest measured peak over predicted", min(ratios), "ratio", 0.9),
            at_most("chosen plan's step time over unchunked", slower, "ratio", 1.34),
            at_least("unchunked peak over chosen plan's", saved, "ratio", 1.0),
        ],
        "calibration": calibration.to_json(),
        "cap_bytes": CAP_BYTES,
        "points": [
            {
                "chunk_length": point.plan.chunk_length,
                "num_chunks": point.plan.num_chunks,
                "state_policy": point.plan.state_policy,
                "predicted_peak_bytes": point.plan.predicted_peak_bytes,
                "measured_peak_bytes": point.peak_bytes,
                "predicted_step_seconds": point.plan.predicted_step_seconds,
                "measured_step_seconds": point.step_seconds,
            }
            for point in points
        ],
    }


if __name__ == "__main__":
    main()
