"""The demonstration: one real job from upload to sample, through nothing but the REST API."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cli.client import Client, Dataset, Job, Metric, Plan
from cli.live import follow, why
from cli.plans import show_choice, show_frontier
from cli.sizes import BYTES_PER_MIB, format_bytes, format_seconds
from cli.up import Options, Stack, interrupt, on_signals

MODEL = "performer-tiny"
SEQUENCE_LENGTH = 8_192
BATCH_SIZE = 1
STEPS = 200
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
EVALUATE_EVERY = 50
EVALUATE_SEQUENCES = 2
CHECKPOINT_EVERY = 100
VALIDATION = slice(6, None, 10)
"""Which of the documents, in order of their names, are for validation: every tenth, here with a tenth of the text."""
CAP_STEP_BYTES = 10 * BYTES_PER_MIB
"""The cap is rounded down to a multiple of this."""
NO_CAP_BYTES = 1 << 40
"""Where no device has announced how much it has."""
PROMPT = "The import statement"
SAMPLE_TOKENS = 200


class DemoError(RuntimeError):
    """The demonstration did not get through."""


def run_demo(console: Console, home: Path, url: str | None = None, steps: int = STEPS) -> None:
    """Start the service (unless `url` names a running one), run a job of `steps` steps,
    stop what was started.

    Raises StackError, ServiceError, DamagedDownloadError or DemoError, and KeyboardInterrupt for SIGINT and SIGTERM.
    """
    begin = time.monotonic()
    with on_signals(interrupt):
        if url is None:
            options = Options(home, port=0, authentication="none")
            with Stack(options, lambda text: console.print(text, markup=False)) as stack:
                ready = format_seconds(time.monotonic() - begin)
                console.print(f"the service is ready at {stack.url} after {ready}")
                _show(console, home, stack.url, steps, stack.check)
        else:
            _show(console, home, url, steps, lambda: None)
    nothing_runs = "" if url else "; everything that was started has stopped"
    console.print(f"done in {format_seconds(time.monotonic() - begin)}{nothing_runs}")


def _show(console: Console, home: Path, url: str, steps: int, check: Callable[[], None]) -> None:
    folder = home / "demo"
    with Client(url) as client:
        training, validation = (client.datasets.upload(path) for path in write_datasets(folder))
        _show_datasets(console, training, validation)
        request = _request(training, validation, steps)
        live = [device["memory_bytes"] for device in client.devices.list() if device["live"]]
        largest = max(live, default=NO_CAP_BYTES)
        free = client.plans.create(**request, memory_cap=largest)
        _show_frontier(console, free)
        cap = choose_cap(free)
        job = client.jobs.create(**request, memory_cap=cap)
        _show_plan(console, job)
        try:
            metrics = follow(console, job, check)
        except KeyboardInterrupt:
            job.cancel()
            raise
        if job.status != "succeeded":
            raise DemoError(why(job))
        _show_result(console, job, metrics)
        _download(console, job, folder / job.id)
        _show_sample(console, job)


def write_datasets(folder: Path) -> tuple[Path, Path]:
    """CPython's own documentation, which every Python brings along: a training and a validation file, by document."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "pydoc-train.jsonl", folder / "pydoc-validation.jsonl"
    documents = [json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)]
    validation = documents[VALIDATION]
    del documents[VALIDATION]
    for path, lines in zip(paths, (documents, validation), strict=True):
        path.write_text("".join(lines), encoding="utf-8")
    return paths


def choose_cap(plan: Plan) -> int:
    """A quarter of the way from the smallest cap that works at all to what the ordinary step would take; bytes."""
    quarter = (3 * plan["minimum_cap_bytes"] + plan["unchunked_peak_bytes"]) // 4
    return max(quarter // CAP_STEP_BYTES * CAP_STEP_BYTES, plan["minimum_cap_bytes"])


def _request(training: Dataset, validation: Dataset, steps: int) -> dict[str, Any]:
    return {
        "name": "demo",
        "model": MODEL,
        "dataset": training["id"],
        "validation_dataset": validation["id"],
        "sequence_length": SEQUENCE_LENGTH,
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE},
        "schedule": {"name": "cosine", "warmup_steps": min(WARMUP_STEPS, steps)},
        "evaluate_every": EVALUATE_EVERY,
        "evaluate_sequences": EVALUATE_SEQUENCES,
        "checkpoint_every": CHECKPOINT_EVERY,
    }


def _show_datasets(console: Console, training: Dataset, validation: Dataset) -> None:
    console.print()
    for purpose, dataset in (("training", training), ("validation", validation)):
        console.print(
            f"uploaded for {purpose}: {dataset['documents']} documents, {dataset['tokens']:,} tokens ({dataset['id']})",
            soft_wrap=True,
        )


def _show_frontier(console: Console, plan: Plan) -> None:
    console.print()
    show_frontier(console, plan, f"POST /plans: {MODEL}, sequences of {SEQUENCE_LENGTH:,} tokens")


def _show_plan(console: Console, job: Job) -> None:
    console.print()
    console.print(f"POST /jobs: {job.id} under a cap of [bold]{format_bytes(job.memory_cap_bytes)}[/bold]")
    show_choice(console, job.plan)
    console.print()


def _show_result(console: Console, job: Job, metrics: list[Metric]) -> None:
    evaluations = [(row["step"], row["validation_loss"]) for row in metrics if row["validation_loss"] is not None]
    console.print()
    console.print(
        "validation loss, nats per byte: " + ", ".join(f"{loss:.3f} at step {step}" for step, loss in evaluations),
        soft_wrap=True,
    )
    plan = job.plan
    seconds = [row["step_seconds"] for row in metrics if row["step_seconds"] is not None]
    table = Table("", "plan", "measured", title="What was promised and what was measured", title_justify="left")
    table.add_row(
        "peak memory", format_bytes(plan["predicted_peak_bytes"]), _known(job.measured_peak_bytes, format_bytes)
    )
    table.add_row("cap", format_bytes(job.memory_cap_bytes), _verdict(job))
    table.add_row(
        "time per step",
        format_seconds(plan["predicted_step_seconds"]),
        _known(statistics.median(seconds) if seconds else None, format_seconds),
    )
    table.add_row("unchunked peak", format_bytes(plan["unchunked_peak_bytes"]), "not run: it would break the cap")
    if (certificate := job.data["certificate"]) is not None and (check := certificate["gradient_check"]) is not None:
        beside = f"against chunks of {check['compared_with']:,}"
        table.add_row("gradient error", "0", f"{check['relative_error']:.1e} {beside}")
    console.print(table)


def _known(value: Any, write: Callable[[Any], str]) -> str:
    return "unknown" if value is None else write(value)


def _verdict(job: Job) -> str:
    measured = job.measured_peak_bytes
    if measured is None:
        return "unknown"
    return "held" if measured <= job.memory_cap_bytes else "BROKEN"


def _download(console: Console, job: Job, folder: Path) -> None:
    """All files of the final checkpoint, each verified while it arrives."""
    files = job.download(folder)
    size = sum(file.stat().st_size for file in files)
    console.print()
    console.print(
        f"downloaded the final checkpoint: {len(files)} files, {format_bytes(size)}, "
        f"every SHA-256 verified; in {folder}",
        soft_wrap=True,
    )


def _show_sample(console: Console, job: Job) -> None:
    """What the final checkpoint makes of a prompt."""
    sample = job.generate(PROMPT, checkpoint="final", max_tokens=SAMPLE_TOKENS, seed=0)
    console.print(Panel(Text(PROMPT + sample["text"]), title=f"a sample of {SAMPLE_TOKENS} bytes", title_align="left"))
