"""The demonstration: one real job from upload to sample, through nothing but the REST API."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from cli.client import Client, Dataset, Job, Metric, Plan
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

POLL_SECONDS = 0.3
PLAIN_EVERY = 10
"""Steps between lines where there is no terminal to draw a bar on."""
FRONTIER_ROWS = 6


class DemoError(RuntimeError):
    """The demonstration did not get through."""


def run_demo(
    console: Console, home: Path, url: str | None = None, steps: int = STEPS, api_key: str | None = None
) -> None:
    """Start the service (unless `url` names a running one, which may ask for `api_key`), run a job of `steps` steps,
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
                _show(console, home, stack.url, steps, stack.check, None)
        else:
            _show(console, home, url, steps, lambda: None, api_key)
    nothing_runs = "" if url else "; everything that was started has stopped"
    console.print(f"done in {format_seconds(time.monotonic() - begin)}{nothing_runs}")


def _show(console: Console, home: Path, url: str, steps: int, check: Callable[[], None], api_key: str | None) -> None:
    folder = home / "demo"
    with Client(url, api_key=api_key) as client:
        training, validation = (client.upload_dataset(path) for path in write_datasets(folder))
        _show_datasets(console, training, validation)
        request = _request(training, validation, steps)
        largest = max((device["memory_bytes"] for device in client.devices() if device["live"]), default=NO_CAP_BYTES)
        free = client.plan({**request, "memory_cap": largest})
        _show_frontier(console, free)
        cap = choose_cap(free)
        job = client.create_job({**request, "memory_cap": cap})
        _show_plan(console, job)
        try:
            job, metrics = _watch(console, client, job, check)
        except KeyboardInterrupt:
            client.cancel(job["id"])
            raise
        if job["status"] != "succeeded":
            raise DemoError(_why(job))
        _show_result(console, job, metrics)
        _download(console, client, job, folder / job["id"])
        _show_sample(console, client, job)


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
    """At most a handful of the planner's best schedules, from the leanest to the fastest."""
    points = sorted(plan["frontier"], key=lambda point: point["predicted_peak_bytes"])
    if len(points) > FRONTIER_ROWS:
        last = len(points) - 1
        points = [points[round(row * last / (FRONTIER_ROWS - 1))] for row in range(FRONTIER_ROWS)]
    table = Table(title=f"POST /plans: {MODEL}, sequences of {SEQUENCE_LENGTH:,} tokens", title_justify="left")
    for column in ("chunk length", "states", "peak memory", "time per step"):
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(
            f"{point['chunk_length']:,}",
            point["state_policy"],
            format_bytes(point["predicted_peak_bytes"]),
            format_seconds(point["predicted_step_seconds"]),
        )
    console.print()
    console.print(table)
    console.print(f"the ordinary, unchunked step would take {format_bytes(plan['unchunked_peak_bytes'])}")
    console.print(f"the least that a plan exists for is {format_bytes(plan['minimum_cap_bytes'])}")


def _show_plan(console: Console, job: Job) -> None:
    plan = job["plan"]
    console.print()
    console.print(f"POST /jobs: {job['id']} under a cap of [bold]{format_bytes(job['memory_cap'])}[/bold]")
    console.print(
        f"plan: {plan['num_chunks']} chunks of {plan['chunk_length']:,} tokens, states: {plan['state_policy']}, "
        f"peak {format_bytes(plan['predicted_peak_bytes'])}, {format_seconds(plan['predicted_step_seconds'])} per step",
        soft_wrap=True,
    )
    console.print(f"because: {plan['reason']}", markup=False, soft_wrap=True)
    console.print()


def _watch(console: Console, client: Client, job: Job, check: Callable[[], None]) -> tuple[Job, list[Metric]]:
    """Follow the job to its end; the rows of all its steps."""
    rows: dict[int, Metric] = {}
    with _reporter(console, job) as report:
        while True:
            check()
            job = client.job(job["id"])
            # From the last row on, not after it: a validation loss is added to a row that is already there.
            for row in client.metrics(job["id"], after_step=max(rows, default=0) - 1):
                rows[row["step"]] = row
            report(job)
            if job["status"] in ("succeeded", "failed", "cancelled", "paused"):
                return job, [rows[step] for step in sorted(rows)]
            time.sleep(POLL_SECONDS)


@contextmanager
def _reporter(console: Console, job: Job) -> Iterator[Callable[[Job], None]]:
    """A live bar on a terminal, else a line every few steps."""
    total = job["progress"]["total_steps"]
    if not console.is_terminal:
        yield _LineReporter(console)
        return
    columns = TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(24), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        yield _BarReporter(progress, progress.add_task(_state(job), total=total))


class _LineReporter:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0
        self._status = ""

    def __call__(self, job: Job) -> None:
        progress = job["progress"]
        if progress["step"] < self._next and job["status"] == self._status:
            return
        self._next = progress["step"] // PLAIN_EVERY * PLAIN_EVERY + PLAIN_EVERY
        self._status = job["status"]
        self._console.print(
            f"step {progress['step']}/{progress['total_steps']} {_state(job)}", markup=False, soft_wrap=True
        )


class _BarReporter:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, job: Job) -> None:
        self._progress.update(self._task, completed=job["progress"]["step"], description=_state(job))


def _state(job: Job) -> str:
    """Where a job is, in one line: status, loss, step time, memory against the cap, time left."""
    progress = job["progress"]
    parts = [job["status"]] if job["status"] != "running" or progress["step"] == 0 else []
    if progress["loss"] is not None:
        parts.append(f"loss {progress['loss']:.3f}")
    if progress["step_seconds"] is not None:
        parts.append(f"{format_seconds(progress['step_seconds'])}/step")
    if job["measured_peak_bytes"] is not None:
        parts.append(f"memory {format_bytes(job['measured_peak_bytes'])} of {format_bytes(job['memory_cap'])}")
    if progress["eta_seconds"]:
        parts.append(f"{format_seconds(progress['eta_seconds'])} left")
    return ", ".join(parts)


def _why(job: Job) -> str:
    error = job["error"]
    if error is None:
        return f"{job['id']} ended as {job['status']}"
    hint = f" ({error['hint']})" if error.get("hint") else ""
    return f"{job['id']} {job['status']}: {error['code']}: {error['message']}{hint}"


def _show_result(console: Console, job: Job, metrics: list[Metric]) -> None:
    evaluations = [(row["step"], row["validation_loss"]) for row in metrics if row["validation_loss"] is not None]
    console.print()
    console.print(
        "validation loss, nats per byte: " + ", ".join(f"{loss:.3f} at step {step}" for step, loss in evaluations),
        soft_wrap=True,
    )
    plan = job["plan"]
    seconds = [row["step_seconds"] for row in metrics if row["step_seconds"] is not None]
    table = Table("", "plan", "measured", title="What was promised and what was measured", title_justify="left")
    table.add_row(
        "peak memory", format_bytes(plan["predicted_peak_bytes"]), _known(job["measured_peak_bytes"], format_bytes)
    )
    table.add_row("cap", format_bytes(job["memory_cap"]), _verdict(job))
    table.add_row(
        "time per step",
        format_seconds(plan["predicted_step_seconds"]),
        _known(statistics.median(seconds) if seconds else None, format_seconds),
    )
    table.add_row("unchunked peak", format_bytes(plan["unchunked_peak_bytes"]), "not run: it would break the cap")
    if job["certificate"] is not None and (check := job["certificate"]["gradient_check"]) is not None:
        beside = f"against chunks of {check['compared_with']:,}"
        table.add_row("gradient error", "0", f"{check['relative_error']:.1e} {beside}")
    console.print(table)


def _known(value: Any, write: Callable[[Any], str]) -> str:
    return "unknown" if value is None else write(value)


def _verdict(job: Job) -> str:
    measured = job["measured_peak_bytes"]
    if measured is None:
        return "unknown"
    return "held" if measured <= job["memory_cap"] else "BROKEN"


def _download(console: Console, client: Client, job: Job, folder: Path) -> None:
    """All files of the final checkpoint, each verified while it arrives."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = client.checkpoint(job["id"], "final")
    for file in checkpoint["files"]:
        client.download(job["id"], checkpoint["step"], file, folder)
    size = sum(file["bytes"] for file in checkpoint["files"])
    console.print()
    console.print(
        f"downloaded the final checkpoint: {len(checkpoint['files'])} files, {format_bytes(size)}, "
        f"every SHA-256 verified; in {folder}",
        soft_wrap=True,
    )


def _show_sample(console: Console, client: Client, job: Job) -> None:
    """What the final checkpoint makes of a prompt."""
    request = {"prompt": PROMPT, "checkpoint": "final", "max_tokens": SAMPLE_TOKENS, "seed": 0}
    text = "".join(piece for piece in client.generate(job["id"], request) if isinstance(piece, str))
    console.print(Panel(Text(PROMPT + text), title=f"a sample of {SAMPLE_TOKENS} bytes", title_align="left"))
