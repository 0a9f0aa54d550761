"""Plans against what their jobs then need: random job specifications, each run for two steps in a fresh process.

    python -m benchmarks.plan_accuracy [--count 200] [--seed 0] [--attention softmax] [--out FOLDER] [--draw]

Writes docs/figures/plan_accuracy.json and .png, for Transformers plan_accuracy_softmax.json and .png, and fills in
docs/plan-accuracy.md. The constants of the memory model are never fitted to the specifications of seed 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.bench_measure import MIB, ROOT, machine, probe, progress
from benchmarks.page import Target, at_least, at_most, fill, table, targets_table
from slim_core.config import FEATURE_MAPS, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from slim_core.data.prepare import make_tokens
from slim_core.planning import Calibration, Workload, plan_job
from slim_core.planning.costs import PRODUCT_ROWS, PRODUCT_WIDTHS
from worker.calibrator import measure
from worker.environment import SPIN_COUNT

STEPS = 2
LONGEST_STEP_SECONDS = 3.0
"""Specifications whose predicted step takes longer are drawn again: 200 of them have to run in half an hour."""
LARGEST_BYTES = 6 << 30
NO_CAP = 1 << 50

Record = dict[str, Any]
"""One specification: what was drawn, its plan, and what its process measured."""


def main() -> None:
    """Run, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=["performer", "softmax"], default="performer")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "plan-accuracy.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    kind = "" if arguments.attention == "performer" else f"_{arguments.attention}"
    path = folder / f"plan_accuracy{kind}.json"
    record = (
        json.loads(path.read_text()) if arguments.draw else run(arguments.count, arguments.seed, arguments.attention)
    )
    record = {"targets": targets(record["specifications"]), **{k: v for k, v in record.items() if k != "targets"}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    picture = path.with_suffix(".png")
    blocks = {
        "targets": targets_table(record["targets"]),
        "summary": _summary(record, picture.name),
        "groups": _groups(record),
    }
    page.write_text(fill(page.read_text(), {f"{name}{kind}": text for name, text in blocks.items()}))
    _draw(record["specifications"], picture)
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page}, {path}, {picture}")


def run(count: int, seed: int, attention: str) -> Record:
    """`count` specifications, one after the other, planned with a calibration that is measured first."""
    threads = os.cpu_count() or 1
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))  # as a worker with several slots
    calibration = measure(threads)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data.txt"
        source.write_text("\n".join(topics.values()))
        data = make_tokens(source)
        drawn = specifications(seed, calibration, attention)
        for number, (workload, cap) in zip(range(count), drawn, strict=False):
            records.append(measured(workload, cap, calibration, data))
            shown = [f"{records[-1][name]:.3f}" for name in ("peak_ratio", "time_ratio")]
            progress(f"{number + 1}/{count}", *shown, records[-1]["plan"]["chunk_length"], workload)
    return {"machine": machine(), "seed": seed, "calibration": calibration.to_json(), "specifications": records}


def specifications(seed: int, calibration: Calibration, attention: str = "performer") -> Iterator[tuple[Workload, int]]:
    """Workloads and caps, without end, the same for the same seed but for what the calibration's speed rules out."""
    source = random.Random(seed)  # noqa: S311  # no secret
    while True:
        if attention == "performer":
            workload = Workload(_performer(source), _train(source))
        else:
            model = _transformer(source)
            length = int(2 ** source.uniform(6, 12.5))
            workload = Workload(model, replace(_train(source), sequence_length=length))
        free = plan_job(workload, NO_CAP, calibration)
        lowest, highest = free.minimum_cap_bytes, max(free.unchunked_peak_bytes, free.minimum_cap_bytes)
        cap = int(lowest * (1.02 * highest / lowest) ** source.random()) + 1
        plan = plan_job(workload, cap, calibration)
        if plan.predicted_step_seconds <= LONGEST_STEP_SECONDS and plan.predicted_peak_bytes <= LARGEST_BYTES:
            yield workload, cap


def _performer(source: random.Random) -> ModelConfig:
    width = source.choice([64, 128, 192, 256, 384, 512, 768])
    feature_map = source.choice(FEATURE_MAPS)
    positions = source.choice(["sinusoidal", "sinusoidal", "rotary", "none", "concatenated"])
    return ModelConfig(
        num_layers=source.randint(1, 6),
        model_width=width,
        num_heads=width // source.choice([32, 64]),
        mlp_width=width * source.choice([2, 4]),
        vocab_size=source.choice([257, 257, 1_000, 8_000, 32_000]),
        feature_map=feature_map,
        num_features=source.choice([None, 64, 128]) if feature_map == "favor" else None,
        norm=source.choice(["pre", "pre", "post", "branch"]),
        activation=source.choice(["gelu", "gelu", "swiglu"]),
        positions=positions,  # type: ignore[arg-type]
        output_projection=source.random() < 0.5,
        attention_bias=source.random() < 0.2,
        tied_embeddings=positions != "concatenated" and source.random() < 0.3,
    )


def _transformer(source: random.Random) -> ModelConfig:
    """Of the Llama family or GPT-2's, as they are uploaded."""
    width = source.choice([64, 128, 192, 256, 384, 512, 768])
    heads = width // source.choice([32, 64])
    llama = source.random() < 0.7
    groups = [count for count in (1, 2, 3, 4, heads) if heads % count == 0]
    return ModelConfig(
        attention="softmax",
        num_layers=source.randint(1, 6),
        model_width=width,
        num_heads=heads,
        num_kv_heads=source.choice(groups) if llama else None,
        mlp_width=width * source.choice([2, 3, 4]),
        vocab_size=source.choice([257, 8_000, 32_000, 49_152]),
        norm_type="rms" if llama else "layer",
        activation="swiglu" if llama else "gelu_tanh",
        mlp_bias=not llama,
        positions="rotary" if llama else "learned",
        max_positions=None if llama else 1 << 13,
        attention_bias=not llama or source.random() < 0.2,
        output_bias=not llama,
        scaled_embeddings=False,
        tied_embeddings=source.random() < 0.7,
    )


def _train(source: random.Random) -> TrainConfig:
    targets = source.choice(
        [("query", "key_value"), ("mlp_in", "mlp_out"), ("query", "key_value", "mlp_in", "mlp_out")]
    )
    lora = LoraConfig(rank=source.choice([4, 8, 32]), targets=targets)
    return TrainConfig(
        sequence_length=int(2 ** source.uniform(6, 16)),
        batch_size=source.choice([1, 1, 1, 2, 4]),
        steps=STEPS,
        optimizer=OptimizerConfig(name=source.choice(["adamw", "adamw", "adafactor", "sgd"])),
        lora=lora if source.random() < 0.25 else None,
        precision="bfloat16" if source.random() < 0.2 else "float32",
        dropout=source.choice([0.0, 0.0, 0.0, 0.1]),
        label_smoothing=source.choice([0.0, 0.0, 0.1]),
        evaluate_every=source.choice([None, STEPS]),
        evaluate_sequences=1,
    )


def measured(workload: Workload, cap: int, calibration: Calibration, data: Path) -> Record:
    """The plan under the cap, and the peak and the second step's time of a process that follows it."""
    plan = plan_job(workload, cap, calibration)
    result = probe(workload, plan, data, calibration.threads)
    return {
        "model": workload.model.to_json(),
        "train": workload.train.to_json(),
        "memory_cap_bytes": cap,
        "plan": {name: value for name, value in plan.to_json().items() if name not in ("frontier", "reason")},
        "measured": result,
        "peak_ratio": result["peak_bytes"] / plan.predicted_peak_bytes,
        "time_ratio": result["step_seconds"] / plan.predicted_step_seconds,
    }


def targets(records: list[Record]) -> list[Target]:
    """Of all specifications."""
    peaks = [record["peak_ratio"] for record in records]
    times = [record["time_ratio"] for record in records]
    close = sum(0.90 <= ratio <= 1.0 for ratio in peaks) / len(peaks)
    timely = sum(0.75 <= ratio <= 1.25 for ratio in times) / len(times)
    return [
        at_least("peak", close, "share with measured / predicted in [0.90, 1.00], at least", 0.95),
        at_most("peak never above", max(peaks), "largest measured / predicted, at most", 1.0),
        at_least("time", timely, "share with measured / predicted in [0.75, 1.25], at least", 0.90),
    ]


def _summary(record: Record, picture: str) -> str:
    where = record["machine"]
    processor = f"{where['cpu']}, {where['threads']} threads, {where['memory_gib']} GiB, torch {where['torch']}"
    count = len(record["specifications"])
    operations = 2.0 * PRODUCT_ROWS[2] * PRODUCT_WIDTHS[3] ** 2
    rates = ", ".join(
        f"{name} {operations / record['calibration'][name]['product'][2][3] / 1e9:.0f} GFLOP/s"
        for name in ("float32", "bfloat16")
    )
    conditions = f"{count} specifications of seed {record['seed']} on {processor}. Large products: {rates}."
    return f"{conditions}\n\n![Measured against predicted peak memory and step time](figures/{picture})"


def _groups(record: Record) -> str:
    """Every option's share of the errors."""
    records = record["specifications"]
    groups = {
        "all": records,
        **{f"features {name}": [r for r in records if _features(r["model"]) == name] for name in FEATURE_MAPS},
        "Llama": [r for r in records if r["model"]["norm_type"] == "rms"],
        "GPT-2": [r for r in records if r["model"]["attention"] == "softmax" and r["model"]["norm_type"] == "layer"],
        **{
            f"optimiser {name}": [r for r in records if r["train"]["optimizer"]["name"] == name]
            for name in ("adamw", "adafactor", "sgd")
        },
        "LoRA": [r for r in records if r["train"]["lora"]],
        "bfloat16": [r for r in records if r["train"]["precision"] == "bfloat16"],
        "dropout": [r for r in records if r["train"]["dropout"]],
        "SwiGLU": [r for r in records if r["model"]["activation"] == "swiglu"],
        "rotary": [r for r in records if r["model"]["positions"] == "rotary"],
        "V of 8,000 or more": [r for r in records if r["model"]["vocab_size"] >= 8_000],
        "with evaluation": [r for r in records if r["train"]["evaluate_every"]],
        "one chunk": [r for r in records if r["plan"]["num_chunks"] == 1],
        "more than 16 chunks": [r for r in records if r["plan"]["num_chunks"] > 16],
    }
    head = ["", "jobs", "peak: least", "median", "most", "time: least", "median", "most"]
    rows = [
        [name, str(len(members)), *_spread(members, "peak_ratio"), *_spread(members, "time_ratio")]
        for name, members in groups.items()
        if members
    ]
    return table(head, rows)


def _features(model: Record) -> str | None:
    return model["feature_map"] if model["attention"] == "performer" else None


def _spread(records: list[Record], name: str) -> list[str]:
    ratios = sorted(record[name] for record in records)
    return [f"{ratio:.2f}" for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1])]


def _draw(records: list[Record], path: Path) -> None:
    """Measured against predicted, peaks and times."""
    import matplotlib as mpl  # noqa: PLC0415  # a test that draws nothing needs none

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    peaks = [(r["plan"]["predicted_peak_bytes"] / MIB, r["measured"]["peak_bytes"] / MIB) for r in records]
    times = [(r["plan"]["predicted_step_seconds"], r["measured"]["step_seconds"]) for r in records]
    for axes, points, low, high, unit in ((left, peaks, 0.9, 1.0, "MiB"), (right, times, 0.75, 1.25, "s")):
        ends = [min(map(min, points)) / 1.2, max(map(max, points)) * 1.2]
        axes.fill_between(ends, [low * x for x in ends], [high * x for x in ends], color="#dbeafe", linewidth=0)
        axes.plot(ends, ends, color="#111827", linewidth=0.8)
        inside = [low * x <= y <= high * x for x, y in points]
        colours = ["#2563eb" if good else "#c2410c" for good in inside]
        axes.scatter(*zip(*points, strict=True), c=colours, s=12, linewidths=0)
        axes.set(
            xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.text(0.04, 0.92, f"{sum(inside)} of {len(inside)} in the band", transform=axes.transAxes, fontsize=9)
    left.set_title("Peak memory (band: 0.90 to 1.00 of the plan)", loc="left", fontsize=10)
    right.set_title("Step time (band: within 25 %)", loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
